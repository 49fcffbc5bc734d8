"""Studies: several methods trained and measured under equal conditions, and the tables of what came out."""
