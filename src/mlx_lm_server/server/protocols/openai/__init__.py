"""The OpenAI API: schema → adapter → GenerateRequest, and events → chunks."""
