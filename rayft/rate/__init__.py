"""The page on which people rate answers: `rayft rate`, and what their ratings say.

`items` is what there is to rate, `ledger` what was rated (one append-only file, one writer), `share` who rates what and
in which order they see the answers, `agreement` and `rows` what comes out, `server` the page.
"""
