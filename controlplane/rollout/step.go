package rollout

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// Bounds of the default soak, and what an edge adds to it.
	leastSoak   = 2 * time.Second
	mostSoak    = 90 * time.Second
	soakPerEdge = time.Second
	// leastPatience is the least time for which further changes take the place of one
	// that is under way; it is twice what all stages take, if that is more.
	leastPatience = 10 * time.Second
	// awayFor is how long an edge may be away before that counts.
	awayFor = 10 * time.Second
	// silentFor is how long after it was sent a change an edge that never answered lost
	// its stream, when the change is not to blame: a process that ends with it does so
	// sooner, and what the network keeps is noticed later, by what is sent to keep
	// connections alive.
	silentFor = 15 * time.Second
)

// Fleet is what is known at one moment.
type Fleet struct {
	// Cluster, Newest and Change name the newest revision, Now and By say how and by
	// whom it was made.
	Cluster string
	Newest  int64
	Change  int64
	// Rebased is the revision of Record.BaseChange in this cluster, 0 when it is not
	// kept. It counts when the record is of another cluster.
	Rebased int64
	Now     bool
	By      string
	// Policy is what a change that begins now goes by.
	Policy *resealv1.RolloutPolicy
	// Edges are the live ones.
	Edges []Edge
	// Missing are replicas that did not answer: their edges are not in Edges.
	Missing []string
	// Shares compares what edges do that have the candidate with what others do, and
	// with what they did themselves. Nil: nothing is known.
	Shares *Shares
}

// Edge is a live edge.
type Edge struct {
	ID     string
	Labels map[string]string
	// Touched says that it serves something, and that the candidate changes what it is
	// to hold.
	Touched bool
	// Connected says that it has a stream; Away is for how long it has had none.
	Connected bool
	Away      time.Duration
	// Silent says that it was out of reach when it was sent the candidate.
	Silent bool
	// Sent is the revision that it was sent last, Acked the one that it acked last.
	Sent, Acked int64
	// Refused is why it refused what it was sent last, "" when it did not.
	Refused string
	// Crashes is how often its process ended out of order with the candidate, and
	// Started when it began anew.
	Crashes int
	Started time.Time
}

// Step says what a rollout is from now on: r itself when nothing changes. It is pure.
// A nil record is one of a store that never had any: the newest revision is the base.
func Step(now time.Time, r *Record, f *Fleet) *Record {
	switch {
	case r == nil || r.Cluster == f.Cluster && r.Base > f.Newest:
		// There is none, or etcd went back to before it.
		return first(now, f)
	case r.Cluster != f.Cluster:
		return r.restored(now, f)
	}
	if r.Candidate != f.Newest && r.yields(now) {
		return r.begin(now, f)
	}
	if r.Phase != resealv1.Rollout_PHASE_RUNNING {
		return r
	}
	if reason := r.failed(f); reason != "" {
		return r.fail(now, reason)
	}
	if next := r.replaced(now, f); next != nil {
		return next
	}
	if now.Sub(r.Entered) < r.Soak || len(r.waits(f)) > 0 {
		return r
	}
	next := *r
	next.enter(now, f)
	return &next
}

func first(now time.Time, f *Fleet) *Record {
	return &Record{
		Format: recordFormat, Cluster: f.Cluster, Base: f.Newest, BaseChange: f.Change, Candidate: f.Newest, CandidateChange: f.Change,
		Phase: resealv1.Rollout_PHASE_DONE, Policy: policy{f.Policy.WithDefaults()}, Begun: now, Started: now, Entered: now, All: true,
	}
}

// restored is what a backup leaves of a rollout: where it stood among the edges is not
// known, and what had not proved itself must not go to all of them.
func (r *Record) restored(now time.Time, f *Fleet) *Record {
	next := first(now, f)
	if next.Verdicts = r.Verdicts; r.Candidate == r.Base || f.Rebased == 0 || f.Rebased == f.Newest {
		return next
	}
	next.Base, next.BaseChange, next.Phase, next.All = f.Rebased, r.BaseChange, resealv1.Rollout_PHASE_UNDONE, false
	next.Reason = "the store was restored from a backup in which this change had not gone to all edges; resume it, or apply what is wanted"
	next.verdict()
	return next
}

// yields says whether a newer revision may take the place of the candidate. One that is
// under way yields, but not for ever: if changes came without end, none would reach
// all edges.
func (r *Record) yields(now time.Time) bool {
	switch r.Phase {
	case resealv1.Rollout_PHASE_PAUSED:
		return false
	case resealv1.Rollout_PHASE_RUNNING:
		return now.Sub(r.Begun) < max(leastPatience, 2*r.Soak*time.Duration(len(r.Policy.GetStages())))
	}
	return true
}

// begin makes the newest revision the candidate.
func (r *Record) begin(now time.Time, f *Fleet) *Record {
	next := *r
	switch {
	case !r.underWay():
		next.Seed, next.Begun = f.Newest, now
	case r.All && r.Phase == resealv1.Rollout_PHASE_RUNNING:
		// It went to all edges: nobody goes back behind it.
		next.Base, next.BaseChange, next.Begun = r.Candidate, r.CandidateChange, now
	}
	next.Candidate, next.CandidateChange, next.Policy, next.Retried = f.Newest, f.Change, policy{f.Policy.WithDefaults()}, time.Time{}
	next.Phase, next.Stage, next.Until, next.All, next.Moved = resealv1.Rollout_PHASE_RUNNING, 0, 0, false, 0
	next.Started, next.Now, next.By, next.Reason = now, f.Now, f.By, ""
	next.enter(now, f)
	return &next
}

// enter goes on to the next stage that adds an edge, or to the end.
func (r *Record) enter(now time.Time, f *Fleet) {
	r.Entered, r.Reason = now, ""
	total := f.touched()
	switch {
	case r.All:
		r.finish()
		return
	case len(f.Missing) > 0 && total == 0:
		return // see waits
	case len(f.Missing) > 0:
		total++ // one that is not seen may be touched: there is somebody to protect
	}
	stages := r.Policy.GetStages()
	for r.Stage < len(stages) {
		r.Stage++
		stage, order := stages[r.Stage-1], r.order(f)
		wanted := r.wanted(stage, order, total)
		if wanted >= total {
			break
		}
		if wanted = min(wanted, len(order)); wanted > r.Moved {
			r.Moved, r.Soak = wanted, r.soak(stage, total)
			if last := order[wanted-1]; !r.named(last.Labels) {
				r.Until = max(r.Until, place(r.Seed, last.ID))
			}
			return
		}
	}
	r.Stage, r.All, r.Until, r.Moved, r.Soak = len(stages), true, math.MaxUint64, total, 0
	if total == 0 {
		r.Stage = 0
	} else if n := len(stages); n > 0 && stages[n-1].GetPercent() == 100 && stages[n-1].GetSoak() != nil {
		r.Soak = r.shortened(stages[n-1].GetSoak().AsDuration())
	}
	if r.Soak == 0 {
		r.finish()
	}
}

// replaced is the same stage with other edges in the place of those that are gone, or
// can't be reached, nil when none has to be: a stage that nobody proves proves nothing.
// What stages select by label nobody else stands in for.
func (r *Record) replaced(now time.Time, f *Fleet) *Record {
	stages := r.Policy.GetStages()
	if r.All || len(f.Missing) > 0 || r.Stage == 0 || r.Stage > len(stages) || stages[r.Stage-1].GetEdgeSelector() != nil {
		return nil
	}
	missing := r.Moved
	var others []Edge
	for _, edge := range r.order(f) {
		switch has := r.Has(edge.ID, edge.Labels); {
		case has && !edge.Silent:
			missing--
		case !has && edge.Connected:
			others = append(others, edge)
		}
	}
	if missing <= 0 || len(others) == 0 {
		return nil
	}
	next := *r
	next.Until, next.Entered = max(r.Until, place(r.Seed, others[min(missing, len(others))-1].ID)), now
	return &next
}

// touched is how many edges the change touches.
func (f *Fleet) touched() int {
	count := 0
	for _, edge := range f.Edges {
		if edge.Touched {
			count++
		}
	}
	return count
}

// finish makes the candidate the base.
func (r *Record) finish() {
	r.Base, r.BaseChange, r.Phase = r.Candidate, r.CandidateChange, resealv1.Rollout_PHASE_DONE
	// It may have been resumed.
	r.Verdicts = slices.DeleteFunc(slices.Clone(r.Verdicts), func(v Verdict) bool { return v.Revision == r.Candidate })
}

// order are the edges that the change touches, in the order in which they get it: those
// that stages name come first.
func (r *Record) order(f *Fleet) []Edge {
	var touched []Edge
	for _, edge := range f.Edges {
		if edge.Touched {
			touched = append(touched, edge)
		}
	}
	slices.SortFunc(touched, func(a, b Edge) int {
		if x, y := r.named(a.Labels), r.named(b.Labels); x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(place(r.Seed, a.ID), place(r.Seed, b.ID)), strings.Compare(a.ID, b.ID))
	})
	return touched
}

// wanted is how many of total edges have the candidate in a stage.
func (r *Record) wanted(stage *resealv1.RolloutStage, touched []Edge, total int) int {
	switch {
	case stage.GetEdgeSelector() != nil:
		count := 0
		for _, edge := range touched {
			if r.named(edge.Labels) || r.Until > 0 && place(r.Seed, edge.ID) <= r.Until {
				count++
			}
		}
		return count
	case stage.GetEdges() > 0:
		return min(int(stage.GetEdges()), total)
	}
	return (total*int(stage.GetPercent()) + 99) / 100
}

// soak is how long a stage that leaves edges out must prove itself.
func (r *Record) soak(stage *resealv1.RolloutStage, total int) time.Duration {
	if stage.GetSoak() != nil {
		return r.shortened(stage.GetSoak().AsDuration())
	}
	return r.shortened(min(max(time.Duration(total)*soakPerEdge, leastSoak), mostSoak))
}

func (r *Record) shortened(soak time.Duration) time.Duration {
	if r.Now {
		return min(soak, leastSoak)
	}
	return soak
}

// waits says what the next stage waits for, besides time.
func (r *Record) waits(f *Fleet) []string {
	var waits []string
	seen := 0
	for _, edge := range f.Edges {
		if !edge.Touched || !r.Has(edge.ID, edge.Labels) {
			continue
		}
		seen++
		switch {
		case !edge.Connected && (r.All || edge.Silent):
		case !edge.Connected:
			waits = append(waits, fmt.Sprintf("edge %s, which is away", edge.ID))
		case edge.Refused == "" && edge.Acked != r.Candidate:
			waits = append(waits, fmt.Sprintf("edge %s, which has not answered yet", edge.ID))
		}
	}
	if len(f.Missing) > 0 && (seen < r.Moved || r.Stage == 0 && f.touched() == 0) {
		for _, replica := range f.Missing {
			waits = append(waits, fmt.Sprintf("replica %s, which does not answer", replica))
		}
	}
	return waits
}

// failed is why the candidate may not go on, "" when it may.
func (r *Record) failed(f *Fleet) string {
	gates := r.Policy.GetGates()
	var nacks, crashes, disconnects, silent []string
	crashed := 0
	for _, edge := range f.Edges {
		if !r.Has(edge.ID, edge.Labels) || !edge.Touched {
			continue
		}
		if edge.Refused != "" && edge.Sent == r.Candidate {
			nacks = append(nacks, fmt.Sprintf("edge %s refused it: %s", edge.ID, edge.Refused))
		}
		if edge.Crashes > 0 && edge.Started.After(r.Retried) {
			crashed += edge.Crashes
			crashes = append(crashes, fmt.Sprintf("edge %s crashed with it", edge.ID))
		}
		if edge.Silent {
			silent = append(silent, fmt.Sprintf("edge %s fell silent when it was sent it", edge.ID))
		} else if !edge.Connected && edge.Sent == r.Candidate && edge.Away > awayFor {
			disconnects = append(disconnects, fmt.Sprintf("edge %s was sent it, and has been away for more than %s", edge.ID, awayFor))
		}
	}
	switch {
	case crashed > int(gates.GetCrashes()):
		return some(crashes)
	case len(nacks) > int(gates.GetNacks()):
		return some(nacks)
	case len(disconnects) > int(gates.GetDisconnects()):
		return some(disconnects)
	case len(silent) > 1+int(gates.GetDisconnects()): // one may be chance
		return some(silent)
	}
	return f.Shares.worse(gates)
}

// some is a list for people.
func some(texts []string) string {
	slices.Sort(texts)
	const most = 3
	if n := len(texts) - most; n > 0 {
		texts = append(texts[:most:most], fmt.Sprintf("and %d more", n))
	}
	return fleet.Cut(strings.Join(texts, "; "), maxReason)
}

// fail stops the candidate.
func (r *Record) fail(now time.Time, reason string) *Record {
	next := *r
	next.Phase = resealv1.Rollout_PHASE_UNDONE
	if r.Policy.GetOnFailure() == resealv1.RolloutPolicy_ON_FAILURE_PAUSE {
		next.Phase = resealv1.Rollout_PHASE_HALTED
	}
	next.Reason, next.Entered = reason, now
	next.verdict()
	return &next
}
