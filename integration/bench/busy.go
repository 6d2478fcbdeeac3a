package bench

import "github.com/reseal/reseal/integration/process"

// busy starts n processes that take all the CPU they get, and returns what ends
// them.
func busy(n int) (end func(), err error) {
	var all []*process.Process
	end = func() {
		for _, p := range all {
			p.Kill()
		}
	}
	for range n {
		p, err := process.Start(process.Config{Name: "busy", Path: "sh", Args: []string{"-c", "while :; do :; done"}})
		if err != nil {
			end()
			return nil, err
		}
		all = append(all, p)
	}
	return end, nil
}
