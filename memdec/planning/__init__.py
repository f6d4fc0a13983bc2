"""What a run will cost before it starts: sizes of models and texts, a formula for each rule, measured rates, the plan.

May import: everything up to training. All but `measure` needs neither torch nor the network, because Snakemake asks for the
resources of every job.
"""
