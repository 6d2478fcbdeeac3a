package feed

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// trialName is the file that tells the next process what this one tried.
	trialName = "trial"
	// trialTime is how long a configuration must be in force until it has proved
	// itself: longer than a minute, since what is wrong with it may show only when
	// clients, health checks or timers have come round to it.
	trialTime = 2 * time.Minute
	// soundTime is how long it must be in force to be better than nothing, when
	// there is none that has proved itself.
	soundTime = 10 * time.Second
	// maxCrashes is how many processes may end during the trial of a configuration
	// before it is not applied again.
	maxCrashes = 2
	// maxTried bounds the configurations that are remembered.
	maxTried = 16
)

// trial finds configurations that end the process. Before one is applied that has
// not proved itself, a count in the state directory goes up; when it has served for
// trialTime, gave way to another, or the process ends in order, the count goes down
// again. What is left counts processes that crashed or were killed.
//
// Its methods are called by whoever holds Feed.applying, except where they say
// otherwise.
type trial struct {
	state  State
	logger *slog.Logger
	since  time.Time
	failed bool // the last write failed

	version string
	once    sync.Once // reads the file
	mu      sync.Mutex
	running []string // on trial in this process
	record  tried
}

// tried is the content of the file. Hashes are hexadecimal.
type tried struct {
	// Version of the edge that counted: another one may be mended.
	Version string `json:"version"`
	// Counts are the processes that began with a configuration and were not heard
	// of again.
	Counts []count `json:"counts"`
	// Proven are configurations that served for trialTime, the newest last.
	Proven []string `json:"proven"`
	// Sound are configurations that served for soundTime and gave way in order, the
	// newest last.
	Sound []string `json:"sound,omitempty"`
}

type count struct {
	Hash     string `json:"hash"`
	Revision int64  `json:"revision,omitempty"` // at which it was begun last
	Crashes  int    `json:"crashes"`
	// Left says that the control plane has sent another one since it was condemned.
	// If it comes once more, somebody wants it: it gets one more process.
	Left bool `json:"left,omitempty"`
}

func newTrial(config Config) *trial {
	return &trial{state: config.State, logger: config.Logger, version: config.Version}
}

// lock locks the record, which it reads the first time.
func (t *trial) lock() {
	t.once.Do(t.read)
	t.mu.Lock()
}

func (t *trial) read() {
	t.record.Version = t.version
	data, err := t.state.Read(trialName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var before tried
	if err == nil {
		err = json.Unmarshal(data, &before)
	}
	if err != nil {
		t.logger.Error("it isn't known which configurations ended this process before", "error", err)
		return
	}
	if before.Version == t.version {
		t.record.Counts = before.Counts
	}
	t.record.Proven, t.record.Sound = before.Proven, before.Sound
}

// begin puts a configuration on trial, in place of any other.
func (t *trial) begin(held *holding) {
	key := hex.EncodeToString(held.hash)
	if t.runs(key) {
		return
	}
	ended := t.settle()
	if !t.start(key, held.revision) && !ended {
		return
	}
	t.write()
}

// add puts a configuration on trial beside the one that began: what is in force of
// it.
func (t *trial) add(part *holding) {
	key := hex.EncodeToString(part.hash)
	if !t.runs(key) && t.start(key, part.revision) {
		t.write()
	}
}

func (t *trial) runs(key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Contains(t.running, key)
}

func (t *trial) start(key string, revision int64) bool {
	t.lock()
	defer t.mu.Unlock()
	if slices.Contains(t.record.Proven, key) {
		return false
	}
	at := slices.IndexFunc(t.record.Counts, func(c count) bool { return c.Hash == key })
	if at < 0 {
		t.record.Counts = append(t.record.Counts, count{Hash: key})
		t.record.Counts = t.record.Counts[max(0, len(t.record.Counts)-maxTried):]
		at = len(t.record.Counts) - 1
	}
	t.record.Counts[at].Crashes++
	t.record.Counts[at].Revision = revision
	t.running, t.since = append(t.running, key), time.Now()
	return true
}

// settle takes back what was counted of this process. It reports whether there was
// anything.
func (t *trial) settle() bool {
	t.lock()
	defer t.mu.Unlock()
	for _, key := range t.running {
		for i := range t.record.Counts {
			if t.record.Counts[i].Hash == key {
				t.record.Counts[i].Crashes--
			}
		}
	}
	t.record.Counts = slices.DeleteFunc(t.record.Counts, func(c count) bool { return c.Crashes <= 0 })
	some := len(t.running) > 0
	if some && time.Since(t.since) >= soundTime {
		t.record.Sound = append(t.record.Sound, t.running...)
		t.record.Sound = t.record.Sound[max(0, len(t.record.Sound)-maxTried):]
	}
	t.running = nil
	return some
}

// prove ends the trial well when it took long enough.
func (t *trial) prove() {
	t.lock()
	if len(t.running) == 0 || time.Since(t.since) < trialTime {
		t.mu.Unlock()
		return
	}
	for _, key := range t.running {
		t.record.Proven = append(t.record.Proven, key)
		t.record.Counts = slices.DeleteFunc(t.record.Counts, func(c count) bool { return c.Hash == key })
	}
	t.record.Proven = t.record.Proven[max(0, len(t.record.Proven)-maxTried):]
	t.running = nil
	t.mu.Unlock()
	t.write()
}

// proven reports whether a configuration has proved itself. It is safe for
// concurrent use.
func (t *trial) proven(hash []byte) bool {
	t.lock()
	defer t.mu.Unlock()
	return slices.Contains(t.record.Proven, hex.EncodeToString(hash))
}

// sound reports whether a configuration gave way in order after a while, and ended no
// process. It is safe for concurrent use.
func (t *trial) sound(hash []byte) bool {
	key := hex.EncodeToString(hash)
	t.lock()
	defer t.mu.Unlock()
	counted := slices.ContainsFunc(t.record.Counts, func(c count) bool { return c.Hash == key })
	return slices.Contains(t.record.Sound, key) && !counted
}

// sent notes that the control plane wants a configuration now. One that is condemned
// gets another process if it was replaced meanwhile: that is how an operator says
// that it was not to blame.
func (t *trial) sent(hash []byte) {
	key, changed := hex.EncodeToString(hash), false
	t.lock()
	for i := range t.record.Counts {
		switch c := &t.record.Counts[i]; {
		case c.Crashes < maxCrashes || slices.Contains(t.running, c.Hash):
		case c.Hash != key && !c.Left:
			c.Left, changed = true, true
		case c.Hash == key && c.Left:
			c.Left, c.Crashes, changed = false, maxCrashes-1, true
		}
	}
	t.mu.Unlock()
	if changed {
		t.write()
	}
}

// crashed tells which configurations ended processes before this one. It is safe for
// concurrent use.
func (t *trial) crashed() []*resealv1.CrashedConfiguration {
	t.lock()
	defer t.mu.Unlock()
	var all []*resealv1.CrashedConfiguration
	for _, c := range t.record.Counts {
		crashes := c.Crashes
		if slices.Contains(t.running, c.Hash) {
			crashes-- // this process lives
		}
		hash, err := hex.DecodeString(c.Hash)
		if crashes > 0 && err == nil {
			all = append(all, &resealv1.CrashedConfiguration{
				Hash: hash, Revision: c.Revision, Crashes: int32(min(crashes, math.MaxInt32)), GivenUp: crashes >= maxCrashes,
			})
		}
	}
	return all
}

// condemns reports whether a configuration ended too many processes.
func (t *trial) condemns(hash []byte) bool {
	key := hex.EncodeToString(hash)
	t.lock()
	defer t.mu.Unlock()
	crashed := func(c count) bool { return c.Hash == key && c.Crashes >= maxCrashes }
	return !slices.Contains(t.running, key) && slices.ContainsFunc(t.record.Counts, crashed)
}

// write does not wait for the disk: what it says is for the case in which this
// process ends, not the machine.
func (t *trial) write() {
	t.lock()
	data, err := json.Marshal(t.record)
	t.mu.Unlock()
	if err == nil {
		err = t.state.Note(trialName, data)
	}
	if err != nil && !t.failed {
		t.logger.Error("it can't be noted which configuration is being tried; should it end this process, the next one tries it again", "error", err)
	}
	t.failed = err != nil
}

// condemned are the violations of a configuration that may not be applied again.
func (f *Feed) condemned(held *holding) []*resealv1.Violation {
	if !f.trial.condemns(held.hash) {
		return nil
	}
	return []*resealv1.Violation{{Description: fmt.Sprintf(
		"%d times this edge's process ended within %s after it applied this configuration (hash %.6x), so it is not applied again. "+
			"Change the configuration; or, if it was not to blame, roll back and apply it again, and the edge tries it once more",
		maxCrashes, trialTime, held.hash)}}
}

// prove watches the trial.
func (f *Feed) prove(ctx context.Context) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		select {
		case f.applying <- struct{}{}:
			f.trial.prove()
			<-f.applying
		default: // an apply is under way
		}
	}
}

// endTrial notes that this process ends in order.
func (f *Feed) endTrial() {
	f.applying <- struct{}{}
	defer func() { <-f.applying }()
	if f.trial.settle() {
		f.trial.write()
	}
}
