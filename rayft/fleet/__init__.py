"""Runs on a fleet: submission to a cluster, manifests for KubeRay and Kueue, and what is wrong with them.

Works without torch and deepspeed.

`client` is the job API of one cluster, `package` what of a job travels with it, `attempts` the submissions of a run there,
`submit`, `follow`, `stop` and `show` the verbs, `outcome` the one exit code of a run. `lint` says what is wrong with manifests.
`preflight` looks at every node: `scout` on the node, `probe` what it looks at, `verdict` what follows.
"""
