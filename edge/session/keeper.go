package session

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

// The sessions are kept in two files: all of them as they once were, and those of
// the identities that changed since. The second names the first by its hash, so
// that each may be replaced at any time, and a crash in between leaves what was
// there before. When the second gets large, the first is written anew.
const (
	sessionsFile = "sessions"
	changesFile  = "sessions-changes"
)

const (
	// saveDelay is how long a change waits for further ones before it is saved.
	saveDelay = time.Second
	// saveAgain is how long after a failure the next try is made.
	saveAgain = 10 * time.Second
	// saveRate bounds what is written on average, in bytes a second: after a large
	// save the next one waits.
	saveRate = 256 << 10
	// A file of changes may grow to a part of the other one, 1/changesPart, and
	// always to leastChanges bytes.
	changesPart  = 8
	leastChanges = 64 << 10
)

// State keeps sealed files. Read's error for an absent file is fs.ErrNotExist.
// When Write returns nil the content is durable, and a failed Write leaves the
// old one.
type State interface {
	Read(name string) ([]byte, error)
	Write(name string, data []byte) error
	Remove(name string) error
}

// KeeperConfig configures a Keeper.
type KeeperConfig struct {
	// Store is what is kept. Required.
	Store *Store
	// State is where. It must seal what it keeps: secrets are given to it in
	// clear. Required.
	State State
	// Logger is for the operator. Default: nowhere.
	Logger *slog.Logger
}

// Keeper keeps a store's sessions over restarts of the edge. Load comes first,
// before any handshake; then Run.
type Keeper struct {
	cfg KeeperConfig

	// Of the goroutine that runs.
	base    [sha256.Size]byte              // hash of the first file, zero while there is none
	size    int                            // its size
	changed map[exchange.Identity]struct{} // the identities of the second file
	next    time.Time                      // when the next save may be made
}

// NewKeeper makes a Keeper that does nothing yet.
func NewKeeper(cfg KeeperConfig) *Keeper {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Keeper{cfg: cfg}
}

// Load puts the kept sessions into the store and returns how many. Sessions of
// another release of Go are left out, as after an upgrade that brought one: that
// is not an error. On error the store is as it was and works without them.
func (k *Keeper) Load() (int, error) {
	data, err := k.cfg.State.Read(sessionsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("load the kept sessions: %w", err)
	}
	defer clear(data)
	entries, clean, err := parseContainer(data, maxContainer)
	if errors.Is(err, errRelease) {
		k.cfg.Logger.Info("the kept sessions are not used", "reason", err.Error())
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("load the kept sessions: %w", err)
	}
	if clean {
		// From now on tickets are used. A crash before the next save must not
		// find them unused.
		data[flagsAt] &^= flagClean
		if err := k.cfg.State.Write(sessionsFile, data); err != nil {
			k.cfg.Logger.Warn("sessions can't be kept; tickets that may be used only once are dropped", "error", err)
			clean = false
		}
	} else if entries, err = k.loadChanges(entries, sha256.Sum256(data)); err != nil {
		k.cfg.Logger.Warn("the newest of the kept sessions are lost", "error", err)
	}
	return k.cfg.Store.take(entries, clean, time.Now()), nil
}

// loadChanges returns entries with those that changed since in their place.
func (k *Keeper) loadChanges(entries []entry, base [sha256.Size]byte) ([]entry, error) {
	data, err := k.cfg.State.Read(changesFile)
	if errors.Is(err, fs.ErrNotExist) {
		return entries, nil
	}
	if err != nil {
		return entries, err
	}
	defer clear(data)
	if len(data) < len(base) || [sha256.Size]byte(data) != base {
		return entries, nil // of another file, which was replaced
	}
	newer, _, err := parseContainer(data[len(base):], maxContainer)
	if err != nil {
		return entries, err
	}
	replaced := map[exchange.Identity]bool{}
	for _, e := range newer {
		replaced[e.identity] = true
	}
	entries = slices.DeleteFunc(entries, func(e entry) bool { return replaced[e.identity] })
	return append(newer, entries...), nil
}

// flagsAt is where a container's flags stand.
const flagsAt = len(containerMagic) + 1

// Run saves the sessions within 2 s of a change, later after large saves, and a
// last time when ctx ends, which must be after the last handshake. Failures are
// logged, not returned: the edge works without.
func (k *Keeper) Run(ctx context.Context) error {
	changes, stop := k.cfg.Store.Watch()
	defer stop()
	// At once: what was expired in the file is to be erased.
	due := time.NewTimer(saveDelay)
	defer due.Stop()
	waiting, failing := true, false
	for {
		select {
		case <-ctx.Done():
			k.saved(k.saveAll(true), &failing)
			return nil
		case <-changes:
			if !waiting {
				waiting = true
				due.Reset(max(saveDelay, time.Until(k.next)))
			}
		case <-due.C:
			waiting = !k.saved(k.save(), &failing)
			if waiting {
				due.Reset(saveAgain)
			}
		}
	}
}

// save writes what changed since the last save.
func (k *Keeper) save() error {
	changes := k.cfg.Store.takeChanges()
	if changes.all || k.size == 0 {
		return k.saveAll(false)
	}
	for identity := range changes.identities {
		k.changed[identity] = struct{}{}
	}
	part, ok := k.cfg.Store.exportOf(slices.Sorted(maps.Keys(k.changed)), time.Now())
	data := slices.Concat(k.base[:], part)
	clear(part)
	defer clear(data)
	if !ok || len(data) > max(leastChanges, k.size/changesPart) {
		return k.saveAll(false)
	}
	return k.write(changesFile, data)
}

// saveAll writes all anew.
func (k *Keeper) saveAll(clean bool) error {
	k.cfg.Store.takeChanges() // all of them are in it
	data := k.cfg.Store.Export(time.Now(), clean)
	defer clear(data)
	k.size = 0 // on failure all is to be written again
	if err := k.write(sessionsFile, data); err != nil {
		return err
	}
	k.base, k.size, k.changed = sha256.Sum256(data), len(data), map[exchange.Identity]struct{}{}
	// It is of the old one, so it says nothing any more.
	return k.cfg.State.Remove(changesFile)
}

func (k *Keeper) write(name string, data []byte) error {
	k.next = time.Now().Add(time.Duration(len(data)) * time.Second / saveRate)
	return k.cfg.State.Write(name, data)
}

// saved logs when saving starts to fail and when it works again.
func (k *Keeper) saved(err error, failing *bool) bool {
	switch {
	case err != nil && !*failing:
		k.cfg.Logger.Error("sessions can't be kept; after a restart backends pay for full handshakes", "error", err)
	case err == nil && *failing:
		k.cfg.Logger.Info("sessions are kept again")
	}
	*failing = err != nil
	return err == nil
}

// Erase removes what earlier runs kept.
func (k *Keeper) Erase() error {
	if err := errors.Join(k.cfg.State.Remove(sessionsFile), k.cfg.State.Remove(changesFile)); err != nil {
		return fmt.Errorf("erase the kept sessions: %w", err)
	}
	return nil
}
