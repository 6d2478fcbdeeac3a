package rollout

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	recordFormat = 1
	// maxVerdicts bounds the changes whose end is remembered for the history.
	maxVerdicts = 32
	// maxReason bounds a reason, in bytes.
	maxReason = 1024
)

// errDamaged is the error for a value in etcd that this package did not write.
var errDamaged = errors.New("damaged record of the rollout")

// Record is where the newest change stands, the same for all replicas. It does not
// grow with the fleet.
type Record struct {
	Format int `json:"format"`
	// Cluster is the etcd cluster that numbered the revisions.
	Cluster string `json:"cluster"`
	// Base is the newest revision that went to all edges, Candidate the one that is, or
	// was last, on its way.
	Base      int64 `json:"base"`
	Candidate int64 `json:"candidate"`
	// BaseChange and CandidateChange are their numbers in the history, which stay when
	// the store is restored into another cluster.
	BaseChange      int64 `json:"baseChange,omitempty"`
	CandidateChange int64 `json:"candidateChange,omitempty"`
	// Phase says where it stands.
	Phase resealv1.Rollout_Phase `json:"phase"`
	// Policy is what it goes by.
	Policy policy `json:"policy"`
	// Stage is the number of the stage, from 1. 0: there was none.
	Stage int `json:"stage,omitempty"`
	// Seed orders the edges. It stays while one change takes the place of another.
	Seed int64 `json:"seed,omitempty"`
	// Until is the place of the last edge that has the candidate. 0: none has.
	Until uint64 `json:"until,omitempty,string"`
	// All says that every edge has it.
	All bool `json:"all,omitempty"`
	// Moved is how many of the edges that the change touches had it when the stage
	// began.
	Moved int `json:"moved,omitempty"`
	// Soak is how long the stage must prove itself.
	Soak time.Duration `json:"soak,omitempty"`
	// Begun is when the first change since the base began, Started when the candidate
	// did, Entered when the stage did, or the rollout ended.
	Begun   time.Time `json:"begun"`
	Started time.Time `json:"started"`
	Entered time.Time `json:"entered"`
	// Retried is when an operator let it begin once more: what happened before does not
	// count.
	Retried time.Time `json:"retried,omitzero"`
	// Now says that the soak is shortened. By is who applied the candidate, or gave
	// the last order.
	Now bool   `json:"now,omitempty"`
	By  string `json:"by,omitempty"`
	// Reason is why it stands where it stands.
	Reason string `json:"reason,omitempty"`
	// Verdicts are what became of changes that did not reach all edges, oldest first.
	Verdicts []Verdict `json:"verdicts,omitempty"`
}

// Verdict is what became of a change.
type Verdict struct {
	Revision int64                  `json:"revision"`
	Phase    resealv1.Rollout_Phase `json:"phase"`
	Reason   string                 `json:"reason"`
}

// policy is a RolloutPolicy as JSON, with defaults filled in. A nil one is the default.
type policy struct{ *resealv1.RolloutPolicy }

// MarshalJSON implements json.Marshaler.
func (p policy) MarshalJSON() ([]byte, error) {
	return protojson.Marshal(p.RolloutPolicy.WithDefaults())
}

// UnmarshalJSON implements json.Unmarshaler.
func (p *policy) UnmarshalJSON(data []byte) error {
	read := &resealv1.RolloutPolicy{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, read); err != nil {
		return err
	}
	p.RolloutPolicy = read.WithDefaults()
	return nil
}

func (r *Record) encode() ([]byte, error) { return json.Marshal(r) }

func decode(data []byte) (*Record, error) {
	r := &Record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%w: it is not JSON of the expected form", errDamaged)
	}
	switch {
	case r.Format != recordFormat:
		return nil, fmt.Errorf("%w: format %d, this control plane reads format %d", errDamaged, r.Format, recordFormat)
	case r.Phase < resealv1.Rollout_PHASE_DONE || r.Phase > resealv1.Rollout_PHASE_UNDONE || r.Base <= 0 || r.Stage < 0:
		return nil, fmt.Errorf("%w: phase %d, base %d", errDamaged, r.Phase, r.Base)
	}
	if r.Policy.RolloutPolicy == nil {
		r.Policy.RolloutPolicy = (*resealv1.RolloutPolicy)(nil).WithDefaults()
	}
	return r, nil
}

// underWay says whether edges may have the candidate that is not the base.
func (r *Record) underWay() bool {
	switch r.Phase {
	case resealv1.Rollout_PHASE_RUNNING, resealv1.Rollout_PHASE_PAUSED, resealv1.Rollout_PHASE_HALTED:
		return r.Candidate != r.Base
	}
	return false
}

// Has says whether an edge serves the candidate instead of the base. It needs nothing
// but the record, so every replica says the same.
func (r *Record) Has(id string, labels map[string]string) bool {
	if !r.underWay() {
		return false
	}
	if r.All || r.Until > 0 && place(r.Seed, id) <= r.Until {
		return true
	}
	return r.named(labels)
}

// named says whether a stage that was reached names edges with these labels.
func (r *Record) named(labels map[string]string) bool {
	stages := r.Policy.GetStages()
	for _, stage := range stages[:min(r.Stage, len(stages))] {
		if stage.GetEdgeSelector() != nil && fleet.Selects(stage.GetEdgeSelector(), labels) {
			return true
		}
	}
	return false
}

// place is where an edge stands in the order of one rollout, never 0.
func place(seed int64, id string) uint64 {
	sum := sha256.Sum256([]byte(strconv.FormatInt(seed, 10) + "\x00" + id))
	return min(max(binary.BigEndian.Uint64(sum[:8]), 1), math.MaxUint64-1)
}

// verdict notes the end of the candidate.
func (r *Record) verdict() {
	r.Verdicts = append(r.Verdicts[:len(r.Verdicts):len(r.Verdicts)], Verdict{r.Candidate, r.Phase, r.Reason})
	r.Verdicts = r.Verdicts[max(0, len(r.Verdicts)-maxVerdicts):]
}

// Verdict says what became of a revision on its way to the edges, "" when there is
// nothing to say.
func (r *Record) Verdict(revision int64) string {
	text := ""
	for _, v := range r.Verdicts {
		if v.Revision == revision {
			text = resealv1.Label(v.Phase) + ": " + v.Reason
		}
	}
	return text
}
