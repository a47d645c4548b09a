"""C code and arithmetic of our own for x86 CPUs in float32."""
