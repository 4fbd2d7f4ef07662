"""Demo data: free-text support tickets of a vendor of office devices, and the triage record that its service desk wants.

`rules.py` holds the record and the house rules, `wording_train.py` and `wording_test.py` what customers say, `generate.py` composes
and checks the rows and writes `train.jsonl`, `test.jsonl` and `schema.json`.
"""
