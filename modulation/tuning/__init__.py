"""Learning the factors: meta-learning over attack families, the curve of levels, few-shot adaptation."""
