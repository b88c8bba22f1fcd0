"""What users type: run.py, `python -m eval` and the doctor."""
