package main

import (
	"sync"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// unansweredView is a replica that did not answer, as -o json and yaml show it.
type unansweredView struct {
	Replica string `json:"replica"`
	Address string `json:"address"`
	Reason  string `json:"reason"`
}

func viewUnanswered(replicas []*resealv1.UnansweredReplica) []unansweredView {
	var views []unansweredView
	for _, r := range replicas {
		views = append(views, unansweredView{r.GetId(), r.GetAddress(), r.GetReason()})
	}
	return views
}

// silentReplicas says, once for each, which replicas of the control plane did not
// answer: what is shown lacks their edges.
type silentReplicas struct {
	warnf func(format string, args ...any)

	mu    sync.Mutex
	named map[string]bool // those that did not answer last
}

// note looks at an answer of the control plane.
func (s *silentReplicas) note(answer any) {
	response, ok := answer.(interface {
		GetUnanswered() []*resealv1.UnansweredReplica
	})
	if !ok || s.warnf == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := make(map[string]bool)
	for _, r := range response.GetUnanswered() {
		now[r.GetId()] = true
		if !s.named[r.GetId()] {
			s.warnf("Note: replica %s (%s) did not answer, and its edges are missing: %s\n", r.GetId(), orNone(r.GetAddress()), r.GetReason())
		}
	}
	s.named = now
}
