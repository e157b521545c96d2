"""One model on many processes: meshes, what each rank holds, and who sends what to whom."""
