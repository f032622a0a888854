"""After training: evaluation of exported models, figures, the report and the summary of a run folder."""
