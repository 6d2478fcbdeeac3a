package edge

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/reseal/reseal/edge/upgrade"
)

// handover is where an edge stands between the process before it and the one after.
type handover struct {
	following *stage                           // hears of the process before
	left      atomic.Pointer[upgrade.Progress] // of it, while it drains
	tried     chan struct{}                    // closed when the start has put in force what it could
	parting   chan *upgrade.Parting            // holds the way to the process after, once there is one
	given     atomic.Bool                      // the place is that one's

	mu    sync.Mutex
	yield func() // nil: nothing can be handed over
	busy  bool
}

func newHandover() *handover {
	return &handover{
		following: newStage(context.Background()),
		tried:     make(chan struct{}), parting: make(chan *upgrade.Parting, 1),
	}
}

// open allows hand-overs, which call yield when the other process serves.
func (h *handover) open(yield func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.yield = yield
}

// close allows none any more.
func (h *handover) close() { h.open(nil) }

// begin begins a hand-over, which done ends. The error is ErrNotNow.
func (h *handover) begin() (yield func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.given.Load():
		return nil, fmt.Errorf("%w: another process has taken over already", ErrNotNow)
	case h.busy:
		return nil, fmt.Errorf("%w: another hand-over is under way", ErrNotNow)
	case h.yield == nil:
		return nil, fmt.Errorf("%w: the edge does not serve yet, or stops", ErrNotNow)
	}
	h.busy = true
	return h.yield, nil
}

func (h *handover) done() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.busy = false
}
