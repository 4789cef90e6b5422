"""What a run costs: FLOPs, speed, forecast, and the report on a model."""
