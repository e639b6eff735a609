"""Jobs: many samples of many prompts, ranked, in a folder that survives a kill; on processes, shards and Ray."""
