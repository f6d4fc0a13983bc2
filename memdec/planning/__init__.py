"""What a run will cost before it starts: sizes of models and texts, a formula for each rule, measured rates, the plan.

It needs neither torch nor the network, because Snakemake asks it for the resources of every job.
"""
