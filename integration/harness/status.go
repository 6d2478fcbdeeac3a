package harness

import (
	"slices"
	"time"
)

// EdgeStatus is an edge as `resealctl get edges -o json` shows it.
type EdgeStatus struct {
	ID             string            `json:"id"`
	State          string            `json:"state"`
	Labels         map[string]string `json:"labels"`
	BootID         string            `json:"bootId"`
	AckedRevision  int64             `json:"ackedRevision"`
	TargetRevision int64             `json:"targetRevision"`
	Resources      int               `json:"resources"`
	ResourcesSent  int64             `json:"resourcesSent"`
	Convergence    string            `json:"convergence"`
	IntendedHash   string            `json:"intendedHash"`
	RunningHash    string            `json:"runningHash"`
	Drifted        bool              `json:"drifted"`
	Nack           *struct {
		Revision        int64    `json:"revision"`
		ServingRevision int64    `json:"servingRevision"`
		Partly          bool     `json:"partly"`
		HeldBack        []string `json:"heldBack"`
		Violations      []struct {
			Resource    string `json:"resource"`
			Field       string `json:"field"`
			Description string `json:"description"`
		} `json:"violations"`
	} `json:"nack"`
}

// Edges lists the fleet's edges.
func (f *Fleet) Edges() []EdgeStatus {
	f.TB.Helper()
	var list struct {
		Edges []EdgeStatus `json:"edges"`
	}
	f.CtlJSON(&list, "get", "edges")
	return list.Edges
}

// WaitEdges waits until condition holds for each of the named edges, and returns
// how long that took and what the edges then were.
func (f *Fleet) WaitEdges(what string, condition func(EdgeStatus) bool, ids ...string) (time.Duration, []EdgeStatus) {
	f.TB.Helper()
	start := time.Now()
	for {
		edges := f.Edges()
		var matching []EdgeStatus
		for _, edge := range edges {
			if slices.Contains(ids, edge.ID) && condition(edge) {
				matching = append(matching, edge)
			}
		}
		if len(matching) == len(ids) {
			return time.Since(start), matching
		}
		if time.Since(start) > startTimeout {
			f.TB.Fatalf("edges %v: not %s within %v: %+v", ids, what, startTimeout, edges)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// WaitAcked waits until the edges acked revision or a newer one.
func (f *Fleet) WaitAcked(revision int64, edges ...*Edge) time.Duration {
	f.TB.Helper()
	var ids []string
	for _, edge := range edges {
		ids = append(ids, edge.ID)
	}
	took, _ := f.WaitEdges("synced", func(e EdgeStatus) bool { return e.AckedRevision >= revision && e.State == "synced" }, ids...)
	return took
}

// Stats are the counters of a pool or listener as `resealctl stats -o json`
// shows them.
type Stats struct {
	Name           string           `json:"name"`
	Requests       int64            `json:"requests"`
	Errors         int64            `json:"errors"`
	ErrorsByReason map[string]int64 `json:"errorsByReason"`
	Handshakes     struct {
		Full    int64 `json:"full"`
		Resumed struct {
			SessionID int64 `json:"sessionId"`
			Ticket    int64 `json:"ticket"`
			PSK       int64 `json:"psk"`
		} `json:"resumed"`
		Failed int64 `json:"failed"`
	} `json:"handshakes"`
	Misses      map[string]int64 `json:"misses"`
	Connections struct {
		Opened int64 `json:"opened"`
		Reused int64 `json:"reused"`
		Active int64 `json:"active"`
		Idle   int64 `json:"idle"`
	} `json:"connections"`
	Closes map[string]int64 `json:"closes"`
	// Of listeners alone; KeyUnknownByEdge only in the fleet's totals.
	Epochs           []EpochStats     `json:"epochs"`
	KeyUnknownByEdge map[string]int64 `json:"keyUnknownByEdge"`
}

// EpochStats are the handshakes of clients whose ticket names an epoch.
type EpochStats struct {
	Keyring string           `json:"keyring"`
	Epoch   uint64           `json:"epoch"`
	Resumed int64            `json:"resumed"`
	Misses  map[string]int64 `json:"misses"`
}

// Of is the counters of one epoch, without any when no client brought its
// tickets.
func (s Stats) Of(keyring string, epoch uint64) EpochStats {
	for _, e := range s.Epochs {
		if e.Keyring == keyring && e.Epoch == epoch {
			return e
		}
	}
	return EpochStats{Keyring: keyring, Epoch: epoch}
}

// Resumed is the sum over the mechanisms.
func (s Stats) Resumed() int64 {
	r := s.Handshakes.Resumed
	return r.SessionID + r.Ticket + r.PSK
}

// Missed is the sum over the reasons.
func (s Stats) Missed() int64 {
	var sum int64
	for _, n := range s.Misses {
		sum += n
	}
	return sum
}

// PoolStats are the counters of a pool in the whole fleet.
func (f *Fleet) PoolStats(name string) Stats {
	f.TB.Helper()
	var answer struct {
		Pools []Stats `json:"pools"`
	}
	f.CtlJSON(&answer, "stats", "pools", name)
	return f.only(answer.Pools, name)
}

// ListenerStats are the counters of a listener in the whole fleet.
func (f *Fleet) ListenerStats(name string) Stats {
	f.TB.Helper()
	var answer struct {
		Listeners []Stats `json:"listeners"`
	}
	f.CtlJSON(&answer, "stats", "listeners", name)
	return f.only(answer.Listeners, name)
}

func (f *Fleet) only(stats []Stats, name string) Stats {
	f.TB.Helper()
	if len(stats) != 1 || stats[0].Name != name {
		f.TB.Fatalf("stats of %q: got %+v", name, stats)
	}
	return stats[0]
}
