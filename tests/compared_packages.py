"""Packages that test files import to compare with, found in the text of a file."""

import re

COMPARED_WITH = re.compile(r"^(?:import|from) (?:torch|transformers)\b", re.MULTILINE)
# From the extra `dev`, which `.ci/run` installs only for the slow tests.
OTHERS = re.compile(r"^(?:import|from) (peft|bitsandbytes)\b", re.MULTILINE)
