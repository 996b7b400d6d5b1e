"""Check the search space before a study, and find untried points during the study."""
