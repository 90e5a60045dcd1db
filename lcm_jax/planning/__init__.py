"""What a run will cost, known before a machine is rented: the step compiled for chips that are not there."""
