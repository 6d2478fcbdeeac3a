// Package keyring holds the ticket keys of the fleet on an edge. The control
// plane brings them and says which epoch encrypts; this package derives from
// them the key of each ticket, keeps them over restarts and outages, and erases
// them in time.
//
// A secret that is erased is overwritten in the memory of this package. Copies
// that the standard library, gRPC and the file system made of it on the way are
// out of reach and go when their memory is used again.
package keyring

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// State keeps files over restarts, sealed. *state.Dir is one.
type State interface {
	// Read returns what was written last. An error that is fs.ErrNotExist means
	// that there is nothing.
	Read(name string) ([]byte, error)
	// Write replaces the content of a file, all or nothing. It does not keep
	// data.
	Write(name string, data []byte) error
	// Remove deletes a file. An absent one is not an error.
	Remove(name string) error
}

// Config is what a Holder needs. It is read once, by New.
type Config struct {
	// Edge is the edge's id, as in its certificate. Required.
	Edge string
	// Labels are matched by selectors. Those of the join token win.
	Labels map[string]string
	// Client calls the control plane. Required.
	Client resealv1.KeyringServiceClient
	// State keeps the keys, sealed. Required.
	State State
	// KeepOnDisk keeps the keys in the file "keyring", so that an edge that
	// starts without a control plane resumes the fleet's sessions. reseal-edge
	// sets it unless it is told otherwise. If false, a file that was kept before
	// is removed.
	KeepOnDisk bool
	// Logger is for the operator of this process. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Nil: none.
	Registerer prometheus.Registerer
}

// Holder holds all keyrings that select this edge. It is safe for concurrent
// use.
type Holder struct {
	config Config
	ready  chan struct{}
	synced chan struct{}
	keeper *keeper
	// inherited is set before Run when another process's keys were taken over.
	inherited bool
	// Each holds a token after a change that tend, and the stream, must see.
	woken   chan struct{}
	expired chan struct{}

	// mu guards the secrets, too: they are read under it and overwritten under
	// it, so that nothing is ever encrypted with a key that is half erased.
	mu        sync.RWMutex
	rings     map[string]*ring
	connected bool // the stream lives and has brought keys
}

// New makes a Holder that does nothing before Run. It panics when its metrics
// are registered already.
func New(config Config) *Holder {
	h := &Holder{
		config:  config,
		ready:   make(chan struct{}),
		synced:  make(chan struct{}),
		woken:   make(chan struct{}, 1),
		expired: make(chan struct{}, 1),
		rings:   map[string]*ring{},
	}
	h.keeper = newKeeper(config, h.encode)
	if config.Registerer != nil {
		config.Registerer.MustRegister(collector{h})
	}
	return h
}

// Run loads the kept keys and follows the control plane until ctx ends, over as
// many streams as that takes. Neither an unreachable control plane nor damaged
// kept keys are an error. It returns nil when the keys are kept for the next
// start.
func (h *Holder) Run(ctx context.Context) error {
	h.load()
	var keeping errgroup.Group
	ended := make(chan struct{})
	keeping.Go(func() error { return h.keeper.run(ended) })

	following, followCtx := errgroup.WithContext(ctx)
	following.Go(func() error { return h.connect(followCtx) })
	following.Go(func() error { return h.tend(followCtx) })
	err := following.Wait()
	close(ended)
	return errors.Join(err, keeping.Wait())
}

// Ready is closed as soon as keys are held, be it from the control plane or from
// the last run.
func (h *Holder) Ready() <-chan struct{} { return h.ready }

// Synced is closed when what the control plane said first is in force. An edge
// that restarts should wait a moment for it: the fleet may have got a new epoch
// meanwhile.
func (h *Holder) Synced() <-chan struct{} { return h.synced }

// Connected tells whether the stream lives and has brought keys.
func (h *Holder) Connected() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.connected
}

// disconnected notes that from now on our own clock decides when keys end.
func (h *Holder) disconnected() {
	h.mu.Lock()
	h.connected = false
	h.mu.Unlock()
	notify(h.woken)
}

// apply makes what was said the keys in force, all or nothing. live is true when
// the control plane said it now. Calls don't overlap. The secrets in response are
// overwritten.
func (h *Holder) apply(response *resealv1.HoldResponse, live bool) error {
	rings, err := newRings(response.GetKeyrings(), time.Now())
	wipe(response.GetKeyrings())
	if err != nil {
		return err
	}
	h.mu.Lock()
	before := h.rings
	for name, next := range rings {
		if old := before[name]; old != nil {
			next.follow(old)
		}
	}
	notes := h.changes(before, rings)
	h.rings, h.connected = rings, live
	for _, old := range before {
		old.erase()
	}
	h.mu.Unlock()
	h.keeper.changed()
	notify(h.woken)
	notes.log()
	return nil
}

// notes are log records that wait until no lock is held: logging may block.
type notes []func()

func (n notes) log() {
	for _, note := range n {
		note()
	}
}

// changes notes which epochs begin and which stop encrypting. h.mu is held.
func (h *Holder) changes(before, after map[string]*ring) (changes notes) {
	for name, next := range after {
		if old := before[name]; old == nil || old.activeNumber() != next.activeNumber() {
			active, epochs := next.activeNumber(), len(next.epochs)
			changes = append(changes, func() {
				h.config.Logger.Info("ticket keys", "keyring", name, "active_epoch", active, "epochs", epochs)
			})
		}
	}
	for name := range before {
		if after[name] == nil {
			changes = append(changes, func() {
				h.config.Logger.Info("ticket keys are erased: the keyring is gone or no longer selects this edge", "keyring", name)
			})
		}
	}
	return changes
}

// held is what the edge tells the control plane about its keys.
func (h *Holder) held() []*resealv1.HeldKeyring {
	h.mu.RLock()
	defer h.mu.RUnlock()
	now := time.Now()
	var held []*resealv1.HeldKeyring
	for _, ring := range h.sorted() {
		keyring := &resealv1.HeldKeyring{Name: ring.name, Epochs: ring.numbers()}
		if ring.issuing(now) {
			keyring.Active = ring.activeNumber()
		}
		held = append(held, keyring)
	}
	return held
}

// signal closes c unless it is closed. Only Run's own goroutine, or the one that
// it started to connect, calls it.
func signal(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// notify leaves a token in c.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
