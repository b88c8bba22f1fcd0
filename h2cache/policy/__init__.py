"""What a method is made of: stages, rules, probes, forecasts. Nothing here knows a model, and nothing has control flow
over a run."""
