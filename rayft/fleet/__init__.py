"""Runs on a fleet: submission to a cluster, manifests for KubeRay and Kueue, and what is wrong with them.

Works without torch and deepspeed.
"""
