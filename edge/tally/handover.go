package tally

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// A process that takes the place of another goes on with its counters, and adds what
// the other one still counts while it drains. So counters never go back, and what was
// counted is reported once. Durations (the histograms) begin anew.

// snapshot is what a tally has counted, by the names of pools and listeners.
type snapshot struct {
	Pools     map[string]counted `json:"pools"`
	Listeners map[string]counted `json:"listeners"`
}

// counted are the counters of one pool or listener.
type counted struct {
	Cells  map[string]int64  `json:"cells,omitempty"` // by exchange.Cell.Key
	Errors map[string]uint64 `json:"errors,omitempty"`
	Epochs []epochCounted    `json:"epochs,omitempty"`
}

type epochCounted struct {
	Keyring  string            `json:"keyring,omitempty"`
	Number   uint64            `json:"number,omitempty"`
	Outcomes map[string]uint64 `json:"outcomes"` // by the label of the miss; "": resumed
}

func (e epochCounted) key() epochKey { return epochKey{e.Keyring, e.Number} }

// cellsByKey are the numbers of the table.
var cellsByKey = func() map[string]exchange.Cell {
	cells := map[string]exchange.Cell{}
	for _, counter := range exchange.Table() {
		for _, cell := range counter.Cells() {
			cells[cell.Key()] = cell
		}
	}
	return cells
}()

// Export is all that was counted, for Inheritance.Take in another process.
func (t *Tally) Export() []byte {
	now := snapshot{map[string]counted{}, map[string]counted{}}
	for _, c := range t.allPools() {
		now.Pools[c.name] = c.export()
	}
	for _, c := range t.allListeners() {
		now.Listeners[c.name] = c.export()
	}
	data, _ := json.Marshal(now) // maps of numbers
	return data
}

func (c *Counters) export() counted {
	all := counted{Cells: map[string]int64{}, Errors: c.errors.read()}
	read := c.read()
	for key, cell := range cellsByKey {
		if n := read.of(cell); n != 0 {
			all.Cells[key] = n
		}
	}
	if c.epochs != nil {
		all.Epochs = c.epochs.export()
	}
	return all
}

func (e *epochs) export() []epochCounted {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := []epochCounted{e.other.export(epochKey{})}
	for _, counts := range []map[epochKey]*epochCount{e.proven, e.named} {
		for key, count := range counts {
			all = append(all, count.export(key))
		}
	}
	return all
}

func (c *epochCount) export(key epochKey) epochCounted {
	made := epochCounted{key.keyring, key.number, map[string]uint64{}}
	for miss, n := range c.outcomes {
		if n > 0 {
			made.Outcomes[outcomeLabel(miss)] = n
		}
	}
	return made
}

func outcomeLabel(miss int) string {
	if miss == 0 {
		return ""
	}
	return missLabel(miss)
}

// Inheritance is what another process has counted, as it is part of a Tally. It is for
// one goroutine.
type Inheritance struct {
	tally  *Tally
	before snapshot
}

// Inherit makes an Inheritance of nothing.
func (t *Tally) Inherit() *Inheritance { return &Inheritance{tally: t} }

// Take adds what an Export holds that the one before did not. What it does not know is
// left out. Pools and listeners that the tally has dropped since stay dropped.
func (i *Inheritance) Take(data []byte) error {
	var now snapshot
	if err := json.Unmarshal(data, &now); err != nil {
		return fmt.Errorf("counters of another process: %w", err)
	}
	i.become(now)
	return nil
}

// End takes back what is true only while the other process lives.
func (i *Inheritance) End() {
	last := func(all map[string]counted) map[string]counted {
		ended := maps.Clone(all)
		for name, c := range ended {
			c.Cells = maps.Clone(c.Cells)
			maps.DeleteFunc(c.Cells, func(key string, _ int64) bool { return isGauge(key) })
			ended[name] = c
		}
		return ended
	}
	i.become(snapshot{last(i.before.Pools), last(i.before.Listeners)})
}

func isGauge(key string) bool {
	cell, ok := cellsByKey[key]
	return ok && cell.Counter.Gauge
}

// become adds what now has grown by.
func (i *Inheritance) become(now snapshot) {
	i.add(now.Pools, i.before.Pools, i.tally.pools, i.tally.Pool)
	i.add(now.Listeners, i.before.Listeners, i.tally.listeners, i.tally.Listener)
	i.before = now
}

// add adds the difference to those that there are, and makes those that were not there
// before.
func (i *Inheritance) add(now, before map[string]counted, present map[string]*Counters, create func(name string) *Counters) {
	for _, name := range slices.Sorted(maps.Keys(now)) {
		old, known := before[name]
		if !known {
			create(name).grow(now[name], counted{})
		} else if c := i.tally.find(present, name); c != nil {
			c.grow(now[name], old)
		}
	}
}

// find is nil when there is none of the name.
func (t *Tally) find(all map[string]*Counters, name string) *Counters {
	t.mu.Lock()
	defer t.mu.Unlock()
	return all[name]
}

func (c *Counters) grow(now, before counted) {
	for key, cell := range cellsByKey {
		if delta := now.Cells[key] - before.Cells[key]; delta > 0 || cell.Counter.Gauge && delta != 0 {
			c.Add(cell, delta)
		}
	}
	for reason, n := range now.Errors {
		if grown := n - min(n, before.Errors[reason]); grown > 0 {
			c.errors.counter(reason).Add(grown)
		}
	}
	if c.epochs != nil {
		c.epochs.grow(now.Epochs, before.Epochs)
	}
}

func (e *epochs) grow(now, before []epochCounted) {
	old := map[epochKey]epochCounted{}
	for _, b := range before {
		old[b.key()] = b
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range now {
		for miss := range misses {
			label := outcomeLabel(miss)
			grown := n.Outcomes[label] - min(n.Outcomes[label], old[n.key()].Outcomes[label])
			if grown == 0 {
				continue
			}
			e.ticks++
			count := e.count(n.key(), proves(resealv1.MissReason(miss)))
			count.outcomes[miss] += grown
			count.last = e.ticks
		}
	}
}
