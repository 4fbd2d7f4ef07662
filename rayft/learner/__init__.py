"""The learner: one class that owns the DeepSpeed engine; every method and every driver trains through it.

The only room that imports deepspeed. It yields and accepts checkpoint fragments that belong to no world size.
"""
