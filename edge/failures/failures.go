// Package failures remembers the last requests that an edge could not serve well.
package failures

import (
	"sync"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Size is how many failures are remembered. With texts of 256 bytes at most they take
// a quarter of a megabyte in the worst case, and a report of them far less than a
// message may have.
const Size = 128

// Ring holds the newest failures. The zero value is empty. It is safe for concurrent
// use, and no call waits for anything.
type Ring struct {
	mu   sync.Mutex
	all  [Size]*resealv1.Failure
	next int // where the oldest is, once the ring is full
}

// Note remembers a failure in place of the oldest. f must not be changed any more.
func (r *Ring) Note(f *resealv1.Failure) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[r.next] = f
	r.next = (r.next + 1) % Size
}

// Report is the answer to an order: the newest that fit it, the oldest first.
func (r *Ring) Report(order *resealv1.FailuresOrder) *resealv1.FailuresReport {
	report := &resealv1.FailuresReport{Id: order.GetId()}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range Size {
		f := r.all[(r.next+i)%Size]
		if f != nil && (order.GetPool() == "" || f.GetPool() == order.GetPool()) && (order.GetListener() == "" || f.GetListener() == order.GetListener()) {
			report.Failures = append(report.Failures, f)
		}
	}
	report.Failures = report.Failures[max(0, len(report.Failures)-max(0, int(order.GetLimit()))):]
	return report
}
