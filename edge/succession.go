package edge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/reseal/reseal/edge/balance"
	"github.com/reseal/reseal/edge/state"
	"github.com/reseal/reseal/edge/upgrade"
)

const (
	// followFor bounds the wait of an edge that ends for a predecessor that still drains.
	followFor = time.Minute
	// tellInterval is how often an edge that drains tells its successor.
	tellInterval = time.Second
	// logInterval is how often it tells the log.
	logInterval = 5 * time.Second
)

// ErrNotNow is the error of HandOver while there is nothing to hand over: before the
// edge serves, during another hand-over, and when it stops.
var ErrNotNow = errors.New("not now")

// openState opens the state directory, or takes it from the predecessor.
func (e *Edge) openState() (*state.Dir, error) {
	if e.cfg.Predecessor == nil {
		return state.Open(e.cfg.StateDir, e.stateKeyFile())
	}
	parts := e.cfg.Predecessor.Parts(upgrade.PartStateLock)
	if len(parts) != 1 || parts[0].File == nil {
		return nil, fmt.Errorf("%w: the state's lock was not handed over", upgrade.ErrProtocol)
	}
	return state.Inherit(e.cfg.StateDir, e.stateKeyFile(), parts[0].File)
}

// inheritKeys takes over the predecessor's ticket keys.
func (e *Edge) inheritKeys() error {
	if e.cfg.Predecessor == nil {
		return nil
	}
	e.keysBy = time.Time{} // they are there
	data := e.cfg.Predecessor.Data(upgrade.PartKeys)
	if data == nil {
		return nil
	}
	if err := e.keyring.Inherit(data); err != nil {
		return fmt.Errorf("ticket keys of the running process: %w", err)
	}
	return nil
}

// succeed gets ready to take the predecessor's place, and waits until it may.
func (e *Edge) succeed(ctx context.Context) error {
	before := e.cfg.Predecessor
	if before == nil {
		return nil
	}
	if data := before.Data(upgrade.PartConfiguration); data != nil {
		if err := e.feed.Inherit(ctx, data); err != nil {
			return err
		}
	}
	if before.Terms.Draining {
		e.frontend.Drain(true, 0)
	}
	if err := before.Ready(ctx); err != nil {
		return err
	}
	// From here on full handshakes would be the price of a mistake, not the place.
	if data := before.Data(upgrade.PartSessions); data != nil {
		if _, err := e.sessions.Import(data, time.Now()); err != nil {
			e.cfg.Logger.Error("the sessions of the process before are not used", "error", err)
		}
		clear(data)
	}
	var health map[string]map[string]balance.Health
	if data := before.Data(upgrade.PartHealth); data != nil && json.Unmarshal(data, &health) == nil {
		e.backend.Inherit(health)
	}
	err := e.frontend.Adopt(e.cfg.Sockets.Keys())
	e.cfg.Sockets.Settle()
	return err
}

// takeOver says that clients are served, and makes the place of the predecessor this
// process's. It does nothing without one.
func (e *Edge) takeOver(ctx context.Context) {
	before := e.cfg.Predecessor
	if before == nil {
		return
	}
	select {
	case <-e.frontend.Serving():
	case <-ctx.Done():
		return
	}
	log := e.cfg.Logger.With("predecessor", before.Terms.PID, "its_version", before.Terms.Version)
	if err := before.Serving(ctx); err != nil {
		log.Error("the process before did not say that it has left its place; taking it all the same", "error", err)
	}
	if err := e.state.TakeOver(); err != nil {
		log.Error("the state can't be written", "error", err)
	}
	inherited := e.tally.Inherit()
	count := func() {
		if data := before.Data(upgrade.PartCounters); data != nil {
			if err := inherited.Take(data); err != nil {
				log.Error("what the process before has counted is lost", "error", err)
			}
		}
	}
	count()
	log.Info("took over; the process before drains")
	e.handover.following.start(func(ctx context.Context) error {
		defer e.handover.left.Store(nil)
		defer inherited.End()
		e.handover.left.Store(&upgrade.Progress{})
		ended := before.Follow(ctx, func(progress upgrade.Progress) {
			count()
			e.handover.left.Store(&progress)
		})
		count()
		if ended {
			log.Info("the process before has drained and ended")
		} else {
			log.Warn("the process before ended without a word")
		}
		return nil
	})
}

// endPredecessor waits for a predecessor that still drains: what it counts is told by
// this process.
func (e *Edge) endPredecessor() {
	timer := time.AfterFunc(followFor, e.handover.following.stop)
	defer timer.Stop()
	_ = e.handover.following.group.Wait() // it has no errors
	e.handover.following.stop()
}

// HandOver gives the place of this process to the one at the other end of conn: its
// successor. Parts are handed over besides the edge's own. Yielding is called when that
// one serves; from then on Run drains and returns. On error nothing has changed, and
// the other process must be ended.
func (e *Edge) HandOver(ctx context.Context, conn *net.UnixConn, parts []upgrade.Part, yielding func()) error {
	yield, err := e.handover.begin()
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer e.handover.done()
	configuration, err := e.feed.Pause(ctx)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	// Whether it stays or goes, what waits may go on; it is refused if this one goes.
	defer func() { e.feed.Resume(!e.handover.given.Load()) }()
	estate, closeFiles := e.estate(configuration, parts)
	defer closeFiles()
	estate.Yield = func() []upgrade.Part {
		yielding()
		e.handover.given.Store(true)
		yield()
		e.state.Yield()
		return e.countersPart()
	}
	parting, err := upgrade.HandOver(ctx, conn, estate)
	if err != nil {
		return err
	}
	e.handover.parting <- parting
	return nil
}

// estate is what is handed over. The function closes the files of it that are no
// others'.
func (e *Edge) estate(configuration []byte, more []upgrade.Part) (estate upgrade.Estate, closeFiles func()) {
	var ours []upgrade.Part
	estate.Terms = upgrade.Terms{
		BootID: e.bootID, StartedAt: e.startedAt, Version: e.cfg.Version, Draining: e.frontend.Draining(),
	}
	estate.Offer = func() ([]upgrade.Part, error) {
		keys, err := e.keyring.Export()
		if err != nil {
			return nil, err
		}
		lock, err := e.state.Lock()
		if err != nil {
			return nil, err
		}
		for key, listener := range e.frontend.Sockets() {
			file, err := listener.File()
			if err != nil {
				return nil, fmt.Errorf("listening socket %s: %w", key, err)
			}
			ours = append(ours, upgrade.Part{Name: upgrade.PartListener, Key: key, File: file})
		}
		parts := append(ours[:len(ours):len(ours)], more...)
		parts = append(parts, e.cfg.Sockets.Parts()...)
		parts = append(parts, upgrade.Part{Name: upgrade.PartStateLock, File: lock}, upgrade.Part{Name: upgrade.PartKeys, Data: keys})
		if configuration != nil {
			parts = append(parts, upgrade.Part{Name: upgrade.PartConfiguration, Data: configuration})
		}
		return parts, nil
	}
	estate.Last = func() []upgrade.Part {
		health, _ := json.Marshal(e.backend.Health()) // maps of plain values
		return []upgrade.Part{
			{Name: upgrade.PartSessions, Data: e.sessions.Export(time.Now(), true)},
			{Name: upgrade.PartHealth, Data: health},
		}
	}
	return estate, func() {
		for _, part := range ours {
			_ = part.File.Close() // it was passed on
		}
	}
}

func (e *Edge) countersPart() []upgrade.Part {
	return []upgrade.Part{{Name: upgrade.PartCounters, Data: e.tally.Export()}}
}

// tellDrained tells the successor, once there is one, how far this process is, until
// ctx ends.
func (e *Edge) tellDrained(ctx context.Context) error {
	var parting *upgrade.Parting
	select {
	case parting = <-e.handover.parting:
	case <-ctx.Done():
		return nil
	}
	defer func() { e.handover.parting <- parting }() // for the last word
	ticker := time.NewTicker(tellInterval)
	defer ticker.Stop()
	var said time.Time
	for {
		open := e.frontend.Connections()
		parting.Tell(upgrade.Progress{Connections: open}, e.countersPart()...)
		if time.Since(said) >= logInterval {
			said = time.Now()
			e.cfg.Logger.Info("draining: another process has taken over", "connections", open)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// sayFarewell tells the successor that all is over.
func (e *Edge) sayFarewell() {
	select {
	case parting := <-e.handover.parting:
		parting.End(e.countersPart()...)
	default:
	}
}

// tellServed calls Config.Served in time.
func (e *Edge) tellServed(ctx context.Context) error {
	if e.cfg.Served == nil {
		return nil
	}
	if e.cfg.Predecessor == nil {
		select {
		case <-e.handover.tried:
		case <-e.feed.Synced():
		case <-ctx.Done():
			return nil
		}
	}
	e.cfg.Served()
	return nil
}
