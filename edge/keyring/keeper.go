package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	fileName = "keyring"
	// rewriteInterval is the pause after a write that failed.
	rewriteInterval = 10 * time.Second
)

// keeper writes the keys that are in force, out of the way of what puts them in
// force: a disk that hangs must not hold up the order to erase a key.
type keeper struct {
	config Config
	encode func() ([]byte, error)
	dirty  chan struct{} // holds a token when there is something to write

	mu      sync.Mutex
	wanted  uint64        // counts changes
	tried   uint64        // the change that a finished write has covered
	advance chan struct{} // closed and replaced after each write
	onDisk  [sha256.Size]byte
}

func newKeeper(config Config, encode func() ([]byte, error)) *keeper {
	return &keeper{
		config: config, encode: encode,
		dirty: make(chan struct{}, 1), advance: make(chan struct{}),
	}
}

// changed has the keys written soon.
func (k *keeper) changed() {
	k.mu.Lock()
	k.wanted++
	k.mu.Unlock()
	notify(k.dirty)
}

// wait returns when all changes so far are written or failed to be, and after
// limit at the latest.
func (k *keeper) wait(ctx context.Context, limit time.Duration) {
	if !k.config.KeepOnDisk {
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	k.mu.Lock()
	wanted := k.wanted
	k.mu.Unlock()
	for {
		k.mu.Lock()
		done, advance := k.tried >= wanted, k.advance
		k.mu.Unlock()
		if done {
			return
		}
		select {
		case <-advance:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// run writes until ended is closed, and then what still waits.
func (k *keeper) run(ended <-chan struct{}) error {
	if !k.config.KeepOnDisk {
		<-ended
		return nil
	}
	again := time.NewTimer(rewriteInterval)
	defer again.Stop()
	again.Stop()
	failed := false
	for {
		select {
		case <-k.dirty:
		case <-again.C:
		case <-ended:
			select {
			case <-k.dirty:
				k.save()
			default:
				if failed {
					k.save()
				}
			}
			return nil
		}
		again.Stop()
		if failed = !k.save(); failed {
			again.Reset(rewriteInterval)
		}
	}
}

// save reports whether the disk now holds the keys in force.
func (k *keeper) save() bool {
	k.mu.Lock()
	covers := k.wanted
	k.mu.Unlock()
	err := k.write()
	if err != nil {
		k.config.Logger.Error("ticket keys can't be kept for the next start, trying again", "error", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tried = covers
	close(k.advance)
	k.advance = make(chan struct{})
	return err == nil
}

func (k *keeper) write() error {
	data, err := k.encode()
	if err != nil {
		return err
	}
	defer clear(data)
	sum := sha256.Sum256(data)
	if sum == k.onDisk {
		return nil
	}
	if err := k.config.State.Write(fileName, data); err != nil {
		return err
	}
	k.onDisk = sum
	return nil
}

// encode is the kept form of the keys: a HoldResponse.
func (h *Holder) encode() ([]byte, error) {
	kept := &resealv1.HoldResponse{}
	h.mu.RLock()
	for _, ring := range h.sorted() {
		kept.Keyrings = append(kept.Keyrings, ring.message())
	}
	h.mu.RUnlock()
	defer wipe(kept.GetKeyrings())
	return proto.MarshalOptions{Deterministic: true}.Marshal(kept)
}

// load restores the keys of the last run, but none whose time has come.
func (h *Holder) load() {
	if !h.config.KeepOnDisk {
		if err := h.config.State.Remove(fileName); err != nil {
			h.config.Logger.Error("kept ticket keys can't be removed", "error", err)
		}
		return
	}
	if h.inherited {
		return // what was held is newer than what was kept
	}
	err := h.loadKept()
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		h.config.Logger.Error("the kept ticket keys can't be used", "error", err)
	default:
		h.sweep(time.Now())
		h.readyIfHeld()
	}
}

func (h *Holder) loadKept() error {
	data, err := h.config.State.Read(fileName)
	if err != nil {
		return err
	}
	defer clear(data)
	kept := &resealv1.HoldResponse{}
	if err := proto.Unmarshal(data, kept); err != nil {
		return fmt.Errorf("%w: %w", errMalformed, err)
	}
	h.keeper.onDisk = sha256.Sum256(data)
	return h.apply(kept, false)
}
