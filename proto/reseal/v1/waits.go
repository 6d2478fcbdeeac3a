package resealv1

import "time"

// WaitBounds divide Stats.waits. Each is about three times the one before.
var WaitBounds = [...]time.Duration{
	10 * time.Millisecond, 30 * time.Millisecond, 100 * time.Millisecond, 300 * time.Millisecond,
	time.Second, 3 * time.Second, 10 * time.Second,
}

// WaitLabels are the keys of Stats.waits: a bound each, and one for what exceeds all.
var WaitLabels = func() []string {
	var labels []string
	for _, bound := range WaitBounds {
		labels = append(labels, bound.String())
	}
	return append(labels, "longer")
}()
