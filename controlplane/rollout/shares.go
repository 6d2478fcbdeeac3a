package rollout

import (
	"fmt"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Share is how many of all events were of a kind.
type Share struct{ Count, Of uint64 }

// Compared are the shares of one kind.
type Compared struct {
	// What is compared, for people: "requests failed".
	What string
	// Moved are the edges that have the candidate, since they have it; Past are the
	// same edges before; Others those that don't have it, since the first do.
	Moved, Past, Others Share
	// FromNothing says that the share counts even with nothing to compare it with.
	FromNothing bool
	// Than is said of the others' shares, when they count something else.
	Than string
}

// Shares are what is compared.
type Shares struct {
	Errors         []Compared
	FullHandshakes []Compared
	Latency        []Compared
}

// worse says what is worse with the candidate, "" when nothing is.
func (s *Shares) worse(gates *resealv1.RolloutGates) string {
	if s == nil {
		return ""
	}
	for _, kind := range []struct {
		gate     *resealv1.RolloutGate
		compared []Compared
	}{{gates.GetErrors(), s.Errors}, {gates.GetFullHandshakes(), s.FullHandshakes}, {gates.GetLatency(), s.Latency}} {
		if kind.gate.GetOff() {
			continue
		}
		for _, c := range kind.compared {
			if text := c.worse(kind.gate); text != "" {
				return text
			}
		}
	}
	return ""
}

// worse compares with all that there is to compare with: what is bad everywhere, or
// always was, is not the candidate's fault.
func (c Compared) worse(gate *resealv1.RolloutGate) string {
	least := uint64(gate.GetMinSamples())
	if c.Moved.Of < max(least, 1) {
		return ""
	}
	share, text, compared := c.Moved.percent(), "", false
	for _, other := range []struct {
		Share
		who string
	}{{c.Others, "on edges without it"}, {c.Past, "on the same edges before"}} {
		if other.Of < max(least, 1) {
			continue
		}
		compared = true
		if share <= other.percent()+float64(gate.GetAllowedPercent()) {
			return ""
		}
		text += fmt.Sprintf(", %.1f%%%s %s", other.percent(), c.Than, other.who)
	}
	if !compared && (!c.FromNothing || share <= float64(gate.GetAllowedPercent())) {
		return ""
	}
	return fmt.Sprintf("%.1f%% of %d %s on edges that have it%s", share, c.Moved.Of, c.What, text)
}

func (s Share) percent() float64 { return 100 * float64(s.Count) / float64(s.Of) }
