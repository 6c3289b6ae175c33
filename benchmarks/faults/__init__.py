"""What a server and its devices survive: one row of a table a file, over one small library.

`server.py` is a server process under test, `devices.py` its devices, `ledger.py` the audit of what became of
every acknowledged update, `row.py` what a row is given and what it answers.
"""
