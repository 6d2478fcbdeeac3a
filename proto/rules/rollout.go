package rules

import resealv1 "github.com/reseal/reseal/proto/reseal/v1"

// maxStages bounds the stages of a rollout: each costs a look at the fleet.
const maxStages = 20

func (c *checker) rolloutPolicy(p *resealv1.RolloutPolicy) {
	if name := c.ref.GetName(); name != "" && name != resealv1.DefaultRollout {
		c.failf("metadata.name", "%s has no effect; the policy that counts is named %q", Quote(name), resealv1.DefaultRollout)
	}
	if len(p.GetStages()) > maxStages {
		c.failf("spec.stages", "holds %d entries; at most %d are allowed", len(p.GetStages()), maxStages)
		return
	}
	for i, stage := range p.GetStages() {
		path, chosen := ItemPath("spec.stages", i), 0
		for _, set := range []bool{stage.GetPercent() > 0, stage.GetEdges() > 0, stage.GetEdgeSelector() != nil} {
			if set {
				chosen++
			}
		}
		if chosen != 1 {
			c.failf(path, "needs exactly one of percent, edges and edgeSelector")
		}
		c.atMost(FieldPath(path, "percent"), stage.GetPercent(), 100)
		c.labels(FieldPath(path, "edgeSelector.matchLabels"), stage.GetEdgeSelector().GetMatchLabels())
	}
	gates := p.GetGates()
	c.atMost("spec.gates.errors.allowedPercent", gates.GetErrors().GetAllowedPercent(), 100)
	c.atMost("spec.gates.fullHandshakes.allowedPercent", gates.GetFullHandshakes().GetAllowedPercent(), 100)
	c.atMost("spec.gates.latency.allowedPercent", gates.GetLatency().GetAllowedPercent(), 100)
}
