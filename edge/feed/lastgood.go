package feed

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	lastGoodName = "last-good"
	// rewriteInterval is the pause after a write that failed.
	rewriteInterval = 10 * time.Second
)

// ErrLastGood is the error of a kept configuration that is damaged.
var ErrLastGood = errors.New("the kept configuration is damaged")

// errNone is the error when none was kept yet.
var errNone = fs.ErrNotExist

// LoadLastGood reads the configuration that was in force last. The error is
// fs.ErrNotExist when none was kept, ErrLastGood when its content does not fit
// its hash or can't be decoded, else the State's. While nothing else is held,
// the feed then tells the control plane that it holds this one, to get only what
// has changed; Run does that by itself. It is safe for concurrent use.
func (f *Feed) LoadLastGood() (*resealv1.Snapshot, error) {
	data, err := f.config.State.Read(lastGoodName)
	if err != nil {
		return nil, fmt.Errorf("read the kept configuration: %w", err)
	}
	kept, err := unmarshalHolding(data)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held == nil {
		f.held = kept
		f.writer.wrote(kept)
	}
	return kept.snapshot(), nil
}

// The kept form is a full Update: it says all that an edge holds, with the hash
// to check it.

func (h *holding) marshal() ([]byte, error) {
	return proto.Marshal(&resealv1.Update{
		ClusterId: h.clusterID, Revision: h.revision, Hash: h.hash, Upserts: h.encoded(),
	})
}

func unmarshalHolding(data []byte) (*holding, error) {
	update := &resealv1.Update{}
	if err := proto.Unmarshal(data, update); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLastGood, err)
	}
	if update.GetBaseRevision() != 0 || len(update.GetDeletes()) != 0 {
		return nil, fmt.Errorf("%w: it is not a full configuration", ErrLastGood)
	}
	var nothing *holding
	kept, err := nothing.with(update)
	if err != nil {
		return nil, fmt.Errorf("%w: the hash does not fit the content", ErrLastGood)
	}
	if violations := kept.problems(); len(violations) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrLastGood, &resealv1.ViolationsError{Violations: violations})
	}
	return kept, nil
}

// writer writes holdings in order, off the way of applies. A newer one replaces
// one that waits.
type writer struct {
	state  State
	logger *slog.Logger
	next   chan *holding

	mu     sync.Mutex
	onDisk *holding // nil: not known
}

func newWriter(state State, logger *slog.Logger) *writer {
	return &writer{state: state, logger: logger, next: make(chan *holding, 1)}
}

// write has h written soon. Calls must not overlap.
func (w *writer) write(h *holding) {
	select {
	case <-w.next:
	default:
	}
	w.next <- h
}

// wrote notes that h is what the disk holds.
func (w *writer) wrote(h *holding) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.onDisk = h
}

// holds tells whether the disk holds the content of h. A revision that moved on
// is not worth a write: the hash alone tells the control plane what is held.
func (w *writer) holds(h *holding) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.onDisk != nil && w.onDisk.clusterID == h.clusterID && bytes.Equal(w.onDisk.hash, h.hash)
}

// run writes until ended is closed, and then what still waits.
func (w *writer) run(ended <-chan struct{}) error {
	var failed *holding
	again := time.NewTimer(rewriteInterval)
	defer again.Stop()
	again.Stop()
	for {
		select {
		case h := <-w.next:
			failed = w.save(h)
		case <-again.C:
			failed = w.save(failed)
		case <-ended:
			select {
			case failed = <-w.next:
			default:
			}
			if failed != nil {
				w.save(failed)
			}
			return nil
		}
		again.Stop()
		if failed != nil {
			again.Reset(rewriteInterval)
		}
	}
}

// save returns h when it could not be written.
func (w *writer) save(h *holding) *holding {
	if w.holds(h) {
		return nil
	}
	data, err := h.marshal()
	if err == nil {
		err = w.state.Write(lastGoodName, data)
	}
	if err != nil {
		w.logger.Error("the configuration can't be kept for the next start, trying again", "revision", h.revision, "error", err)
		return h
	}
	w.wrote(h)
	return nil
}
