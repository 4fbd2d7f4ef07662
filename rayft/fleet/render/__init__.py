"""A job and a fleet profile become a manifest: `rayft k8s render`.

- `pack`, `size`: node type, ZeRO stage and worker groups from the memory plan and the placement table
- `search`: trials of a search at a time
- `pods`, `network`, `manifest`: pod templates, NetworkPolicy, ConfigMap and RayJob
- `files`: what a job names by local path; `secrets`: what may never leave; `names`: names that fit
- `model`: a model's sizes without torch; `apply`: submit with kubectl; `run`: the verb
"""
