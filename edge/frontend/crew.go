package frontend

import (
	"sync"
	"time"
)

// crewStay is how long a goroutine of a crew waits for its next job.
const crewStay = time.Second

// crew does jobs at once, each on a goroutine of its own that stays for the next for
// a while. A handshake needs a larger stack than goroutines begin with, and making a
// stack grow costs a twentieth of the handshake.
type crew struct {
	work *sync.WaitGroup // all goroutines
	jobs chan func()     // to those that wait
	over chan struct{}   // closed when nobody is to stay
}

func newCrew(work *sync.WaitGroup) *crew {
	return &crew{work: work, jobs: make(chan func()), over: make(chan struct{})}
}

// do has a job done by whoever waits for one, or by somebody new.
func (c *crew) do(job func()) {
	select {
	case c.jobs <- job:
	default:
		c.work.Go(func() { c.serve(job) })
	}
}

func (c *crew) serve(job func()) {
	stay := time.NewTimer(crewStay)
	defer stay.Stop()
	for {
		job()
		stay.Reset(crewStay)
		select {
		case job = <-c.jobs:
		case <-stay.C:
			return
		case <-c.over:
			return
		}
	}
}
