"""Reinforcement learning from rewards: Ray actors that hold policy, critic, reference and rewards, and the loop that drives them.

`loop` is the algorithm; read it first. `prompts` says what is asked, `actors` what each process does, `group` how a group of
them is started and called, `rewards` how answers are scored, `layout` who computes which answers together, `experience` how scores
become what is trained on, `run` what happens around the loop. The room stands above `train`, with which it shares lease, run log, history and export.
"""
