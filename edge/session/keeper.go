package session

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"
)

// sessionsFile is the file in the state directory.
const sessionsFile = "sessions"

const (
	// saveDelay is how long a change waits for further ones before it is saved.
	saveDelay = time.Second
	// saveAgain is how long after a failure the next try is made.
	saveAgain = 10 * time.Second
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
// is no error. On error the store is as it was and works without them.
func (k *Keeper) Load() (int, error) {
	data, err := k.cfg.State.Read(sessionsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("load the kept sessions: %w", err)
	}
	defer clear(data)
	if len(data) > flagsAt && data[flagsAt]&flagClean != 0 {
		// From now on tickets are used. A crash before the next save must not
		// find them unused.
		data[flagsAt] &^= flagClean
		if err := k.cfg.State.Write(sessionsFile, data); err != nil {
			k.cfg.Logger.Warn("sessions can't be kept; tickets that may be used only once are dropped", "error", err)
		} else {
			data[flagsAt] |= flagClean
		}
	}
	n, err := k.cfg.Store.Import(data, time.Now())
	if errors.Is(err, errRelease) {
		k.cfg.Logger.Info("the kept sessions are not used", "reason", err.Error())
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("load the kept sessions: %w", err)
	}
	return n, nil
}

// flagsAt is where a container's flags stand.
const flagsAt = len(containerMagic) + 1

// Run saves the sessions within 2 s of a change, and a last time when ctx ends,
// which must be after the last handshake. Failures are logged, not returned: the
// edge works without.
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
			k.saved(k.save(true), &failing)
			return nil
		case <-changes:
			if !waiting {
				waiting = true
				due.Reset(saveDelay)
			}
		case <-due.C:
			waiting = !k.saved(k.save(false), &failing)
			if waiting {
				due.Reset(saveAgain)
			}
		}
	}
}

func (k *Keeper) save(clean bool) error {
	data := k.cfg.Store.Export(time.Now(), clean)
	defer clear(data)
	return k.cfg.State.Write(sessionsFile, data)
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
	if err := k.cfg.State.Remove(sessionsFile); err != nil {
		return fmt.Errorf("erase the kept sessions: %w", err)
	}
	return nil
}
