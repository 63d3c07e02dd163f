"""Looking back: what was recorded, explained, queried, replayed and added up."""
