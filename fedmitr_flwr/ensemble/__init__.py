"""The ensemble of teachers: its weights, trust, averages, and its fast execution in `engine`."""
