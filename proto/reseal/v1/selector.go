package resealv1

// Selects says whether the selector selects an edge with these labels. A nil one
// selects all.
func (x *EdgeSelector) Selects(labels map[string]string) bool {
	for name, want := range x.GetMatchLabels() {
		if value, ok := labels[name]; !ok || value != want {
			return false
		}
	}
	return true
}
