package main

import (
	"encoding/hex"
	"fmt"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// edgeView is an edge as -o json and yaml show it.
type edgeView struct {
	ID             string            `json:"id"`
	State          string            `json:"state"`
	Labels         map[string]string `json:"labels"`
	Version        string            `json:"version"`
	BootID         string            `json:"bootId"`
	Address        string            `json:"address"`
	AckedRevision  int64             `json:"ackedRevision"`
	TargetRevision int64             `json:"targetRevision"`
	Nack           *nackView         `json:"nack,omitempty"`
	Draining       bool              `json:"draining"`
	StartedAt      string            `json:"startedAt,omitempty"`
	ConnectedAt    string            `json:"connectedAt,omitempty"`
	DisconnectedAt string            `json:"disconnectedAt,omitempty"`
	Resources      int32             `json:"resources"`
	ResourcesSent  int64             `json:"resourcesSent"`
	Convergence    string            `json:"convergence,omitempty"`
	Replica        string            `json:"replica,omitempty"`
	Crashed        []crashedView     `json:"crashed,omitempty"`
	IntendedHash   string            `json:"intendedHash,omitempty"`
	AckedHash      string            `json:"ackedHash,omitempty"`
	RunningHash    string            `json:"runningHash,omitempty"`
	Drifted        bool              `json:"drifted,omitempty"`
}

// crashedView is a configuration that may have ended processes of the edge.
type crashedView struct {
	Hash     string `json:"hash"`
	Revision int64  `json:"revision"`
	Crashes  int32  `json:"crashes"`
	GivenUp  bool   `json:"givenUp"`
}

type nackView struct {
	Revision        int64           `json:"revision"`
	ServingRevision int64           `json:"servingRevision"`
	Partly          bool            `json:"partly"`
	HeldBack        []string        `json:"heldBack"`
	Violations      []violationView `json:"violations"`
}

type violationView struct {
	Resource    string `json:"resource"`
	Field       string `json:"field,omitempty"`
	Description string `json:"description"`
}

func viewEdge(e *resealv1.Edge) edgeView {
	view := edgeView{
		ID: e.GetId(), State: resealv1.Label(e.GetState()), Labels: e.GetLabels(), Version: e.GetVersion(),
		BootID: e.GetBootId(), Address: e.GetAddress(), AckedRevision: e.GetAckedRevision(),
		TargetRevision: e.GetTargetRevision(), Draining: e.GetDraining(), Resources: e.GetResources(),
		ResourcesSent: e.GetResourcesSent(), StartedAt: utcStamp(e.GetStartedAt()),
		Replica: e.GetReplica(), ConnectedAt: utcStamp(e.GetConnectedAt()), DisconnectedAt: utcStamp(e.GetDisconnectedAt()),
		IntendedHash: hex.EncodeToString(e.GetIntendedHash()), AckedHash: hex.EncodeToString(e.GetAckedHash()),
		RunningHash: hex.EncodeToString(e.GetRunningHash()), Drifted: e.GetDrifted(),
	}
	if view.Labels == nil {
		view.Labels = map[string]string{}
	}
	if e.GetConvergence() != nil {
		view.Convergence = e.GetConvergence().AsDuration().String()
	}
	for _, c := range e.GetCrashed() {
		view.Crashed = append(view.Crashed, crashedView{
			Hash: hex.EncodeToString(c.GetHash()), Revision: c.GetRevision(), Crashes: c.GetCrashes(), GivenUp: c.GetGivenUp(),
		})
	}
	if nack := e.GetNack(); nack != nil {
		view.Nack = &nackView{
			Revision: nack.GetRevision(), ServingRevision: nack.GetServingRevision(), Partly: nack.GetPartly(),
			HeldBack: refKeys(nack.GetHeldBack()), Violations: []violationView{},
		}
		for _, v := range nack.GetViolations() {
			view.Nack.Violations = append(view.Nack.Violations,
				violationView{Resource: v.GetResource().Key(), Field: v.GetField(), Description: v.GetDescription()})
		}
	}
	return view
}

func refKeys(refs []*resealv1.ResourceRef) []string {
	keys := make([]string, len(refs))
	for i, ref := range refs {
		keys[i] = ref.Key()
	}
	return keys
}

// edgeHeaders and edgeCells are the table of edges.
func edgeHeaders(wide bool) []string {
	headers := []string{"ID", "STATE", "REVISION", "LABELS", "VERSION", "UPTIME", "ADDRESS"}
	if wide {
		headers = append(headers, "CONNECTED", "RESOURCES", "CONVERGENCE", "BOOT", "REPLICA")
	}
	return append(headers, "REASON")
}

func edgeCells(e *resealv1.Edge, wide bool) []string {
	cells := []string{e.GetId(), edgeState(e), edgeRevision(e), joinLabels(e.GetLabels()),
		orNone(e.GetVersion()), age(e.GetStartedAt()), orNone(e.GetAddress())}
	if wide {
		convergence := "<unknown>"
		if e.GetConvergence() != nil {
			convergence = e.GetConvergence().AsDuration().String()
		}
		cells = append(cells, age(e.GetConnectedAt()), fmt.Sprint(e.GetResources()), convergence, orNone(e.GetBootId()), orNone(e.GetReplica()))
	}
	return append(cells, edgeReason(e))
}

// edgeState is the state in capitals, as it stands out in a table.
func edgeState(e *resealv1.Edge) string {
	if e.GetDrifted() && e.GetState() == resealv1.Edge_STATE_SYNCED {
		return "DRIFTED"
	}
	if state := resealv1.Label(e.GetState()); state != "" {
		return strings.ToUpper(state)
	}
	return "UNKNOWN"
}

// edgeRevision is the acked revision, and the target where it differs.
func edgeRevision(e *resealv1.Edge) string {
	if e.GetAckedRevision() == e.GetTargetRevision() {
		return fmt.Sprint(e.GetAckedRevision())
	}
	return fmt.Sprintf("%d/%d", e.GetAckedRevision(), e.GetTargetRevision())
}

// edgeReason says briefly why an edge is not SYNCED.
func edgeReason(e *resealv1.Edge) string {
	const limit = 80
	switch violations := e.GetNack().GetViolations(); {
	case len(violations) > 0:
		text := violations[0].Text()
		if runes := []rune(text); len(runes) > limit {
			text = string(runes[:limit-1]) + "…"
		}
		if more := len(violations) - 1; more > 0 {
			text += fmt.Sprintf(" (+%d more)", more)
		}
		return text
	case e.GetNack() != nil:
		return fmt.Sprintf("refused revision %d", e.GetNack().GetRevision())
	case e.GetDrifted():
		return drift(e)
	case e.GetDisconnectedAt() != nil:
		return "gone for " + age(e.GetDisconnectedAt())
	case len(e.GetCrashed()) > 0:
		return "crashed " + crashText(e.GetCrashed()[0])
	}
	return ""
}

// drift says what an edge that drifted serves.
func drift(e *resealv1.Edge) string {
	return fmt.Sprintf("serves %.6x instead of %.6x, which it acked", e.GetRunningHash(), e.GetIntendedHash())
}

// describeEdge writes all that is known about an edge.
func (a *app) describeEdge(e *resealv1.Edge) {
	d := describer{w: a.out}
	d.line(0, "ID", e.GetId())
	d.line(0, "State", edgeState(e))
	d.labels("Labels", e.GetLabels())
	d.line(0, "Version", orNone(e.GetVersion()))
	d.line(0, "Address", orNone(e.GetAddress()))
	d.line(0, "Replica", orNone(e.GetReplica()))
	d.line(0, "Boot ID", orNone(e.GetBootId()))
	d.line(0, "Started", ago(e.GetStartedAt()))
	d.line(0, "Connected", ago(e.GetConnectedAt()))
	if e.GetDisconnectedAt() != nil {
		d.line(0, "Disconnected", ago(e.GetDisconnectedAt()))
	}
	d.line(0, "Draining", yesNo(e.GetDraining()))
	d.line(0, "Acked revision", fmt.Sprint(e.GetAckedRevision()))
	d.line(0, "Target revision", fmt.Sprint(e.GetTargetRevision()))
	if e.GetConvergence() != nil {
		d.line(0, "Convergence", e.GetConvergence().AsDuration().String())
	}
	if e.GetDrifted() {
		d.line(0, "Drifted", drift(e)+"; the whole configuration is sent to it again")
	}
	d.line(0, "Resources", fmt.Sprintf("%d held, %d sent on this stream", e.GetResources(), e.GetResourcesSent()))
	for _, c := range e.GetCrashed() {
		d.line(0, "Crashed", crashText(c))
	}
	nack := e.GetNack()
	if nack == nil {
		d.flush()
		return
	}
	if nack.GetPartly() {
		d.line(0, "Refused", fmt.Sprintf("a part of revision %d; the rest of it is in force", nack.GetRevision()))
		d.line(0, "Held back", strings.Join(refKeys(nack.GetHeldBack()), ", "))
	} else {
		d.line(0, "Refused", fmt.Sprintf("revision %d; it still serves revision %d", nack.GetRevision(), nack.GetServingRevision()))
	}
	d.heading(0, "Violations")
	for _, v := range nack.GetViolations() {
		d.text(1, v.Text())
	}
	d.flush()
}

// crashText says what is known of a configuration that ended processes.
func crashText(c *resealv1.CrashedConfiguration) string {
	text := fmt.Sprintf("%d times soon after it took revision %d (hash %.6x)", c.GetCrashes(), c.GetRevision(), c.GetHash())
	if c.GetCrashes() == 1 {
		text = fmt.Sprintf("once soon after it took revision %d (hash %.6x)", c.GetRevision(), c.GetHash())
	}
	if c.GetGivenUp() {
		return text + "; it does not apply that one again"
	}
	return text
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
