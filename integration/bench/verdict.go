package bench

import (
	"fmt"
	"time"
)

// latencyRatio is how many times HAProxy's p99 Reseal's may be.
const latencyRatio = 1.2

// Holds reports whether a result of Reseal is within what the scenario allows.
func (s *Scenario) Holds(r Result) bool {
	if s.AtMost {
		return r.Counts.Full >= 1 && r.Counts.Full <= s.Must
	}
	return r.Counts.Full == s.Must
}

// Problems are what is wrong with a result of Reseal. With Bench.Capture unset,
// resets are not among them.
func (s *Scenario) Problems(r Result) []string {
	var all []string
	check := func(ok bool, format string, args ...any) {
		if !ok {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	c, clients := r.Counts, int64(s.clientCount())
	check(s.Holds(r), "%d full handshakes at the backend, must be %s; misses: %v", c.Full, s.must(), r.Ours.Misses)
	check(r.AfterStart == 0 || s.backend == nil, "%d full handshakes after the restart, must be 0; misses: %v", r.AfterStart, r.Ours.Misses)
	check(r.Failed == 0, "%d requests failed; the first ones: %v", r.Failed, r.Errors)
	check(c.Failed == 0, "%d handshakes failed at the backend", c.Failed)
	check(r.Unclean == 0, "%d connections ended without close_notify; closes: %v", r.Unclean, r.Ours.Closes)
	check(r.Resets == 0 || r.ResetsByKernel, "%d RSTs from the edge", r.Resets)
	check(r.TimeWait == 0, "%d connections in TIME_WAIT on the edge's side", r.TimeWait)

	// Numbers that show that the scenario took place at all.
	requests := r.Done + r.Aborted
	check(c.Requests >= requests || s.restarts, "the backend had %d requests of %d", c.Requests, requests)
	check(c.Full+c.Resumed() == c.Connections, "%d connections, but %d full and %d resumed handshakes", c.Connections, c.Full, c.Resumed())
	check(c.Connections >= clients, "%d connections only: the clients did not come at the same time", c.Connections)
	check(!s.closeEach || c.Connections >= requests, "%d connections for %d requests: the backend did not close each", c.Connections, requests)
	check(s.aborts == 0 || r.Aborted > 0, "no request was aborted")

	var missed int64
	for _, n := range r.Ours.Misses {
		missed += n
	}
	check(missed == r.Ours.Full, "the edge gives %d reasons for %d full handshakes", missed, r.Ours.Full)
	same := r.Ours.Full == c.Full && r.Ours.Resumed == c.Resumed()
	if s.stops {
		same = r.Ours.Full <= c.Full && r.Ours.Resumed <= c.Resumed()
	}
	check(same, "the edge counts %d full and %d resumed handshakes, the backend %d and %d", r.Ours.Full, r.Ours.Resumed, c.Full, c.Resumed())
	return all
}

// Slow says that Reseal's requests took too long compared with HAProxy's of the
// same run, or is empty.
func (s *Scenario) Slow(ours, haproxy Result) string {
	if !s.Latency || float64(ours.P99) <= latencyRatio*float64(haproxy.P99) {
		return ""
	}
	return fmt.Sprintf("p99 of a request %v, must be at most %v times HAProxy's %v", ours.P99.Round(time.Microsecond), latencyRatio, haproxy.P99.Round(time.Microsecond))
}

// must is how many full handshakes are allowed, as text.
func (s *Scenario) must() string {
	if s.AtMost {
		return fmt.Sprintf("≤ %d", s.Must)
	}
	return fmt.Sprint(s.Must)
}
