"""One machine plays the coordinator and every site: the run folder, progress, reports, resume."""
