"""Running the phases: tasks, executors, estimate, publishing."""
