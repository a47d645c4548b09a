"""The words of which prompts are made.

Common English words: nearly every tokenizer has each of them, with the space before it, as one
token, so a prompt of n words has about n tokens and the calibration has little to correct.
"""

from __future__ import annotations

from random import Random

_TEXT = """
able about above across act action add after again age ago air all almost alone along also
always among animal another answer any appear area arm around art ask away back bad ball bank
base be bear beat beautiful bed before began begin behind believe best better between big bird
black blood blue board boat body bone book born both bottom box boy branch bread break bring
brother brown build burn business busy but buy call came camp can capital car card care carry
case cat catch cause center central century certain chair chance change chapter character
charge chart check child choose church circle city claim class clean clear climb clock close
cloth cloud coast coat cold collect color column come common company compare complete condition
consider contain control cook cool copy corn corner correct cost cotton could count country
course cover cow create cross crowd cry current cut dance danger dark day dead deal dear death
decide deep degree depend describe desert design determine develop dictionary did die differ
difficult direct discuss distance divide do doctor does dog dollar done door double down draw
dream dress drink drive drop dry during each ear early earth ease east eat edge effect egg
eight either electric element else end enemy energy engine enough enter equal especially even
evening event ever every exact example except excite exercise expect experience experiment eye
face fact fair fall
"""
WORDS = tuple(_TEXT.split())


def make_text(rng: Random, num_words: int) -> str:
    """`num_words` words, each with a space before it."""
    return "".join(f" {word}" for word in rng.choices(WORDS, k=num_words))
