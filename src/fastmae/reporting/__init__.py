"""The HTML page of a run: charts of its metrics, and pictures of what the student and its encoder have learnt."""
