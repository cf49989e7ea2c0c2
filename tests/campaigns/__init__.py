"""Campaigns: faults by the hundred against the real server. A sample of each runs in every test run."""
