"""What a user of a fleet types: submit a job to a Ray cluster, follow, stop and resume it. No torch, no deepspeed.

`client` is the job API of one cluster, `package` what of a job travels with it, `attempts` the submissions of a run there,
`submit`, `follow`, `stop` and `show` the verbs, `outcome` the one exit code of a run.
"""
