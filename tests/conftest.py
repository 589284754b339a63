"""pytest puts the folder of a conftest on the path: so every test can import `problems.py` beside
this file."""
