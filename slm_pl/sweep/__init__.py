"""Methods x ratios x seeds on one model: what there is to do, doing it, and the one table."""
