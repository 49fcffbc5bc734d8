"""A study's figures and analyses: what needs its models is measured once and kept, the rest drawn from records."""
